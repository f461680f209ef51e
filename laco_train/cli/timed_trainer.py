"""Lightning's Trainer, whose checkpoints are no training time."""

from typing import Any

from lightning.pytorch import Trainer

from laco_train.callbacks.curves import Curves


class TimedTrainer(Trainer):
    """Stops the clock before a checkpoint: bringing states to the CPU takes as long as writing them.

    No hook of callbacks comes before that.
    """

    def save_checkpoint(self, filepath: Any, weights_only: bool | None = None, storage_options: Any = None) -> None:
        """As Trainer.save_checkpoint; on all ranks."""
        for callback in self.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Curves):
                callback.pause(self)
        super().save_checkpoint(filepath, weights_only, storage_options)
