"""Keeps Python's search for garbage out of training."""

import gc
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from laco_train.training.loss import Batch


class FreezeGarbage(Callback):
    """After the first batch, what is there stays: no later search for garbage walks through it.

    Now and then Python walks through all objects, of which imports leave hundreds of thousands: 0.26 s on two CPU cores
    for one step (docs/many_gpus.md). All ranks would wait for the one that does.
    """

    def __init__(self) -> None:
        self._frozen = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """The first batch has compiled; its time is not counted either."""
        if not self._frozen:
            gc.collect()
            gc.freeze()
            self._frozen = True

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let what the run leaves behind be found again."""
        self._thaw()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As after an exception."""
        self._thaw()

    def _thaw(self) -> None:
        gc.unfreeze()
        self._frozen = False
