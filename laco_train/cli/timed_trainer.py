"""Lightning's Trainer as runs use it: its defaults, and checkpoints that are no training time."""

from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator

from laco_train.callbacks.curves import Curves

TRAINER_DEFAULTS = {
    "num_sanity_val_steps": 0,  # the loss right after the collapse is measured anyway
    "use_distributed_sampler": False,  # PackedText deals out its batches itself; the injected sampler isn't exact
    "log_every_n_steps": 10,
    "enable_model_summary": False,  # the collapse prints what it left
}


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


def say_device(trainer: Trainer) -> None:
    """Tell who may expect a GPU that none is used."""
    if isinstance(trainer.accelerator, CPUAccelerator) and trainer.is_global_zero:
        print(f"No GPU is used: this run is on the CPU ({torch.get_num_threads()} threads).", flush=True)
