"""Ends a run that is told to go: the step is finished, a checkpoint saved, and the program leaves."""

import os
import signal
import threading
from functools import partial
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from laco_train.training.agreement import Agreement
from laco_train.training.loss import Batch

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_INTERRUPTED = b"\nInterrupted: stopping after this step; again to stop at once, without a checkpoint.\n"


class StopOnSignal(Callback):
    """On SIGTERM, SIGUSR1 or SIGINT, sent to any rank, all ranks stop after the same optimizer step.

    One process stops after the step under way, several after the one that follows it; at the end of an epoch one more
    step is done, as Lightning resumes there one epoch too far, so that epochs of one step are done to the end. What
    raises is Lightning's: the loop, once the step is logged and the validation that follows it is done.

    Lightning's own handlers are never there in a fit: they run a collective from within the signal and under SLURM save
    in the middle of a step. Neither is its question to all ranks before each batch, for which the host waits for the
    device. It puts signals back itself, after the last save (`RecipeCLI` does, where it doesn't get to that).

    A second SIGINT is what it was before, Python's KeyboardInterrupt, for those who can't wait for the step.

    Attributes:
        received: the signal, once there was one.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._stopping = False
        self._process = 0
        self._at_interrupt: Any = signal.default_int_handler
        self._any_rank: Agreement | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the place of what Lightning is about to do."""
        self._any_rank = Agreement(trainer.strategy.root_device, trainer.world_size)
        vars(trainer._signal_connector)["register_signal_handlers"] = partial(self._take_over, trainer)
        vars(trainer.fit_loop.epoch_loop)["_broadcast_sigterm_tensor"] = lambda: None

    def _take_over(self, trainer: Trainer) -> None:
        trainer._signal_connector._original_handlers = trainer._signal_connector._get_current_signal_handlers()
        if threading.current_thread() is threading.main_thread():
            self._process = os.getpid() if trainer.is_global_zero else 0
            self._at_interrupt = signal.getsignal(signal.SIGINT)
            for number in SIGNALS:
                # ignored from the start by what a script leaves in the background; by other ranks, see `main`
                if number != signal.SIGINT or self._at_interrupt != signal.SIG_IGN or not trainer.is_global_zero:
                    signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if number != signal.SIGINT:
            return
        signal.signal(number, self._at_interrupt)
        if os.getpid() == self._process:  # the keyboard's reaches loader processes too, which have this handler
            os.write(2, _INTERRUPTED)  # print may be what was interrupted

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Agree on stopping here: gradients that are half gathered would be lost."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches or trainer.is_last_batch or self._at_end(trainer):
            return
        assert self._any_rank is not None, "training has not started"
        if number := self._any_rank(self.received or 0):
            self.received, self._stopping = number, True
            self._tell(trainer, True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning would stop between two batches of validation, and not validate again on resume."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._tell(trainer, False)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Now it may stop."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._tell(trainer, self._stopping)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the export to the resumed run, if any rank was told to go too late to stop a step.

        Raises:
            SIGTERMException: it was; on all ranks.
        """
        received = torch.tensor(self.received or 0, device=trainer.strategy.root_device)
        if number := int(trainer.strategy.reduce(received, reduce_op="max")):
            self.received = number
            raise SIGTERMException

    @staticmethod
    def _at_end(trainer: Trainer) -> bool:
        return 0 < trainer.max_steps <= trainer.global_step

    @staticmethod
    def _tell(trainer: Trainer, stop: bool) -> None:
        trainer._signal_connector.received_sigterm = stop
