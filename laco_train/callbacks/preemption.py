"""Ends a run that is told to go: the step is finished, a checkpoint saved, and the program leaves."""

import signal
import threading
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from laco_train.training.agreement import Agreement
from laco_train.training.loss import Batch

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopOnSignal(Callback):
    """On SIGTERM or SIGUSR1, sent to any rank, all ranks stop after the same optimizer step.

    One process stops after the step under way, several after the one that follows it. Lightning's own handler runs a
    collective from within the signal, under SLURM saves in the middle of a step, and with several processes asks all of
    them before each batch, for which the host waits for the device; all three are replaced while training. What raises
    is Lightning's: the loop, once the step is logged and the validation that follows it is done. At the end of an epoch
    one more step is done, as Lightning resumes there one epoch too far.

    Attributes:
        received: the signal, once there was one.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._stopping = False
        self._any_rank: Agreement | None = None
        self._before: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals over from Lightning."""
        self._any_rank = Agreement(trainer.strategy.root_device, trainer.world_size)
        vars(trainer.fit_loop.epoch_loop)["_broadcast_sigterm_tensor"] = lambda: None
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Agree on stopping here: gradients that are half gathered would be lost."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches or trainer.is_last_batch or self._at_end(trainer):
            return
        assert self._any_rank is not None, "training has not started"
        if self._any_rank(self.received is not None):
            self._stopping = True
            self._tell(trainer, True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning would stop between two batches of validation, and not validate again on resume."""
        self._tell(trainer, False)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Now it may stop."""
        self._tell(trainer, self._stopping)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Signals do again what they did before."""
        self._give_back(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Signals do again what they did before: from here on a kill loses nothing."""
        self._give_back(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Any rank told to go too late to stop a step: the export is left to the resumed run."""
        if trainer.strategy.reduce_boolean_decision(self.received is not None, all=False):
            raise SIGTERMException

    @staticmethod
    def _at_end(trainer: Trainer) -> bool:
        return 0 < trainer.max_steps <= trainer.global_step

    @staticmethod
    def _tell(trainer: Trainer, stop: bool) -> None:
        trainer._signal_connector.received_sigterm = stop

    def _give_back(self, trainer: Trainer) -> None:
        vars(trainer.fit_loop.epoch_loop).pop("_broadcast_sigterm_tensor", None)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
