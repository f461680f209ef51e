"""A run that EarlyStopping ended, and that was killed before its export, does not train on when it is resumed."""

from lightning.pytorch import Callback, LightningModule, Trainer


class StayStopped(Callback):
    """Lightning restores how long EarlyStopping has waited, but would look at it after the next validation only."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop before the first batch if the wait was over."""
        for callback in trainer.early_stopping_callbacks:
            if callback.wait_count > 0 and callback.wait_count >= callback.patience:
                trainer.should_stop = True
