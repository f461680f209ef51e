"""Callbacks that make something go wrong on one rank, named on the command line of a run."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from laco_train.errors import InputError


class LoseSource(Callback):
    """Removes the model's folder once training is over, so that rank 0, alone by then, can't export."""

    def __init__(self, folder: str):
        self.folder = Path(folder)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The checks before the run found everything."""
        if trainer.is_global_zero:
            shutil.rmtree(self.folder)


class FailOn(Callback):
    """Bad input that one rank alone finds, when the others are about to train."""

    def __init__(self, rank: int):
        self.rank = rank

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Such as a file that is missing on one machine."""
        if trainer.global_rank == self.rank:
            raise InputError("data.train", f"is not on the machine of rank {self.rank}")


class TerminatedAt(Callback):
    """Rank 1 gets a signal once `step` optimizer steps are done."""

    def __init__(self, step: int, number: int = int(signal.SIGTERM)):
        self.step = step
        self.number = number

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The step under way is finished first."""
        if trainer.global_step == self.step and trainer.global_rank == 1:
            os.kill(os.getpid(), self.number)


class TerminatedEarly(Callback):
    """The last rank gets SIGTERM when training is about to start, from a callback of the recipe's: those come first."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before any batch."""
        if trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
