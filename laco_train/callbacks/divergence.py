"""Stops a run that no longer learns: too many steps left out in a row, or a loss that is no number."""

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from laco_train.callbacks.checkpoints import last_checkpoint
from laco_train.errors import TrainingStopped
from laco_train.training.interval import logs_after
from laco_train.training.loss import Batch
from laco_train.training.module import CausalLM
from laco_train.training.parallel import whole
from laco_train.training.skipping import SkippedSteps


def diverged(trainer: Trainer, what: str) -> TrainingStopped:
    """What to raise where `what` happened."""
    return TrainingStopped(
        f"{what} at step {trainer.global_step}; last good checkpoint: {last_checkpoint(trainer)}; "
        "lower model.optimizer.learning_rate, set trainer.gradient_clip_val, or use trainer.precision bf16-mixed"
    )


def not_finite(trainer: Trainer) -> TrainingStopped:
    """What to raise for a loss that was not finite."""
    return diverged(trainer, "the loss was not finite")


@torch.no_grad()
def finite(model: nn.Module) -> bool:
    """Whether every trainable weight is a number."""
    weights: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    return bool(torch.isfinite(whole(nn.utils.get_total_norm(weights))))


class Divergence(Callback):
    """Looks at the count of steps left out at the logging interval, and before anything is kept of the model.

    The module leaves out, on the device, each step whose gradients are not finite (`SkippedSteps`).
    """

    def __init__(self) -> None:
        self._before = 0
        self._skipped = SkippedSteps()

    @property
    def total(self) -> int:
        """Steps left out since the run began."""
        return self._before + (0 if self._skipped.total is None else int(self._skipped.total))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where the module counts."""
        assert isinstance(pl_module, CausalLM)
        self._skipped = pl_module.skipped

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Log how many steps were left out since the run began."""
        stepped = not trainer.fit_loop.epoch_loop._should_accumulate()
        if stepped and logs_after(trainer, trainer.global_step):
            self._stop_beyond_bound(trainer, pl_module)
            pl_module.log("train/skipped_steps", float(self.total))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checkpoints follow validation."""
        if trainer.state.fn == "fit":
            self._stop_beyond_bound(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop before the checkpoint that would follow."""
        loss = trainer.callback_metrics.get("val/loss")
        if trainer.state.fn == "fit" and loss is not None and not math.isfinite(loss):
            raise not_finite(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Never replace a good checkpoint by a broken one."""
        self._stop_beyond_bound(trainer, pl_module)
        if not finite(pl_module):
            raise diverged(trainer, "a weight was not finite")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Never export a broken model."""
        self._stop_beyond_bound(trainer, pl_module)

    def _stop_beyond_bound(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, CausalLM)
        longest, bound = self._skipped.longest, pl_module.settings.optimizer.max_skipped_steps
        if longest is not None and int(longest) >= bound:
            raise diverged(trainer, f"{int(longest)} steps in a row had gradients that were not finite,")

    def state_dict(self) -> dict[str, Any]:
        """The count, so that a resumed run goes on with it."""
        return {"skipped": self.total}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See state_dict."""
        self._before = state_dict["skipped"]
