"""The bar of a run: batches of the whole run, and the time left."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from laco_train.training.interval import logs_after


class RunProgressBar(RichProgressBar):
    """Lightning's rich bar; a run is counted in steps, so that the epoch it may never end is left out.

    The training loss is shown as of the last point that was logged: a look at every step would wait for the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self._shown_step = 0

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"

    def _update_metrics(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # with accumulation, several batches end at the same step
        step = trainer.global_step
        if trainer.validating or (step != self._shown_step and logs_after(trainer, step)):
            self._shown_step = step
            super()._update_metrics(trainer, pl_module)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Lightning's, and the loss of the last training batch."""
        items: dict[str, Any] = dict(super().get_metrics(trainer, pl_module))
        loss = trainer.callback_metrics.get("train/loss")
        return items if loss is None else {**items, "train/loss": float(loss)}
