"""Stops a run whose loss is no longer a number."""

import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from laco_train.callbacks.interval import logs_after
from laco_train.errors import TrainingStopped
from laco_train.training.loss import Batch


def not_finite(trainer: Trainer, step: int) -> TrainingStopped:
    """What to raise for a loss that was not finite once `step` optimizer steps were done."""
    named = Path(getattr(trainer.checkpoint_callback, "best_model_path", ""))
    # the one being saved when the loss was found out is named already, but never written
    written = [named] if named.is_file() else sorted(named.parent.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    good = written[-1] if named.name and written else "none was saved yet"
    return TrainingStopped(
        f"the loss was not finite at step {step}; last good checkpoint: {good}; "
        "lower model.optimizer.learning_rate, set trainer.gradient_clip_val, or use trainer.precision bf16-mixed"
    )


class StopOnNonFiniteLoss(Callback):
    """Remembers on the device the first step with a non-finite loss; looks at it only at the logging interval.

    A look before each checkpoint keeps a broken model from replacing a good one.
    """

    def __init__(self) -> None:
        self._first: Tensor | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Note the step without waiting for the device."""
        loss = outputs["loss"].detach()
        if self._first is None:
            self._first = torch.full((), -1, dtype=torch.int64, device=loss.device)
        broken = ~torch.isfinite(loss) & (self._first < 0)
        self._first = torch.where(broken, trainer.global_step, self._first)
        if logs_after(trainer, trainer.global_step):
            self._stop_if_broken(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checkpoints follow validation."""
        self._stop_if_broken(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A finite training loss may be followed by a step that breaks the model."""
        loss = trainer.callback_metrics.get("val/loss")
        if trainer.state.fn == "fit" and loss is not None and not math.isfinite(loss):
            raise not_finite(trainer, trainer.global_step)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Never save a broken model."""
        self._stop_if_broken(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Never export a broken model."""
        self._stop_if_broken(trainer)

    def _stop_if_broken(self, trainer: Trainer) -> None:
        step = -1 if self._first is None else int(self._first)
        if step >= 0:
            raise not_finite(trainer, step)
