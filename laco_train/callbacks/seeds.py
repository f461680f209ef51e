"""Random numbers of a step that don't depend on what was drawn before it, so that a resumed run draws the same."""

import hashlib
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from laco_train.training.loss import Batch


class SeedSteps(Callback):
    """Seeds torch from (seed, step, batch, rank) before each batch, and from (seed, step) before each update.

    Dropout then differs between ranks, while an update that draws is the same on all of them.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Before dropout."""
        self._seed("batch", trainer.global_step, batch_idx, trainer.global_rank)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Before the update."""
        self._seed("step", trainer.global_step)

    def _seed(self, *key: Any) -> None:
        digest = hashlib.sha256(repr((self.seed, *key)).encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "big", signed=True))
