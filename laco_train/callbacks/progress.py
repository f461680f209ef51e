"""The bar of a run: optimizer steps of the whole run, and the time left."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from laco_train.training.interval import logs_after
from laco_train.training.loss import Batch
from laco_train.training.module import CausalLM


class RunProgressBar(RichProgressBar):
    """Lightning's rich bar, over the optimizer steps of the whole run; Lightning's counts batches of each epoch.

    The training loss is shown as of the last point that was logged: a look at every step would wait for the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self._shown_step = 0

    @property
    def total_train_batches(self) -> int:
        """What Lightning makes the length of the bar: optimizer steps of the run, those before a resume included."""
        module = self.trainer.lightning_module
        assert isinstance(module, CausalLM)
        return module.total_steps()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the bar in the first epoch; later ones go on with it."""
        if self.train_progress_bar_id is None:
            super().on_train_epoch_start(trainer, pl_module)
        self._update(self.train_progress_bar_id, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Lightning's, which shows one more than the index that it is told."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, trainer.global_step - 1)

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
