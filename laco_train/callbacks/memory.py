"""Follows what a run is doing, so that an out-of-memory error can say where it happened and what to try next."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from laco_train.callbacks.checkpoints import last_checkpoint
from laco_train.training.ddp import gradients_stay
from laco_train.training.memory import Phase, Situation, advice, asked_for, limit_gib, peak_gib
from laco_train.training.parallel import local

_DOING: dict[Phase, str] = {
    "before": "before training (loading, search, first validation)",
    "step": "in a training step",
    "optimizer": "in the optimizer's step",
    "validation": "in validation",
    "export": "after training, in the export",
}


class Memory(Callback):
    """Notes the phase of a run, and what the device holds between two steps.

    Attributes:
        held: bytes of weights, gradients and optimizer on this rank's GPU; None before training, and on a CPU.
    """

    def __init__(self) -> None:
        self.phase: Phase = "before"
        self.held: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first step comes next."""
        self.phase = "step"

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note what is held whatever the batch: weights and optimizer, and gradients if they are there yet."""
        self.phase = "step"
        device = trainer.strategy.root_device
        if device.type == "cuda":
            self.held = torch.cuda.memory_allocated(device)
            one = next((p for p in pl_module.parameters() if p.requires_grad), None)
            if one is not None and one.grad is None and not gradients_stay(trainer):
                self.held += gradient_bytes(pl_module)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Gradients are there; the first step allocates the optimizer's state."""
        self.phase = "optimizer"

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation comes between steps, and after the last."""
        self.phase = "validation"

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Steps go on."""
        self.phase = "step"

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Curves may validate once more."""
        self.phase = "validation"

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What is left is the export."""
        self.phase = "export"

    def explain(self, error: BaseException, trainer: Trainer, recipe: dict[str, Any]) -> str:
        """One line: where it happened, the peak, what is kept, and what to try next.

        Args:
            error: the out-of-memory error.
            trainer: the Trainer of the run.
            recipe: what else `Situation` holds: the sections model, data and speed, and searched.
        """
        device = trainer.strategy.root_device
        gpu = device.type == "cuda"
        limit = limit_gib(device)
        situation = Situation(
            phase=self.phase,
            accumulate=trainer.accumulate_grad_batches,
            gpu=gpu,
            free_gib=None if self.held is None else limit - self.held / 2**30,
            **recipe,
        )
        asked = asked_for(error)
        wanted = f"{asked} more was asked for, " if asked else ""
        return (
            f"out of memory {_DOING[self.phase]}: {wanted}the peak was {peak_gib(device):.1f} of {limit:.1f} GiB; "
            f"last good checkpoint: {last_checkpoint(trainer)}; try next: {advice(situation)}"
        )


def gradient_bytes(module: torch.nn.Module) -> int:
    """Memory that the gradients of this process take once they are there."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    return sum(local(p).nbytes for p in trainable)
