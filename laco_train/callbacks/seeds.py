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
        self._seed(trainer, "batch", trainer.global_step, batch_idx, trainer.global_rank)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Before the update."""
        self._seed(trainer, "step", trainer.global_step)

    def _seed(self, trainer: Trainer, *key: Any) -> None:
        digest = hashlib.sha256(repr((self.seed, *key)).encode()).digest()
        seed_device(int.from_bytes(digest[:8], "big", signed=True), trainer.strategy.root_device)


def seed_device(seed: int, device: torch.device) -> None:
    """Seed the CPU's generator and that of `device`, in use already.

    ``torch.manual_seed`` would also note a call, with its stack trace, for each kind of device that is not in use.
    """
    if device.type not in ("cpu", "cuda"):
        torch.manual_seed(seed)
        return
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
