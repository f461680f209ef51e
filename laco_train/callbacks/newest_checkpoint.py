"""The checkpoint that a run goes on from: the newest, and no other."""

import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from laco_train.training.checkpoint_io import broken_shards, not_saved


class NewestCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, which saves after each validation, with two more occasions and less left behind.

    It saves also where training ends between two validations, and where a signal stops it. After a validation between
    the batches of one optimizer step it waits for that step, as gathered gradients are not saved. The one before goes
    once the new one is whole, and so do those that a killed run could not remove.
    """

    _waiting = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lightning's, but a resumed run is meant to find checkpoints in its folder."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
            super().setup(trainer, pl_module, stage)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Until there is a newer one, the newest is the one resumed from."""
        super().on_train_start(trainer, pl_module)
        self.best_model_path = self.best_model_path or str(trainer.ckpt_path or "")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save, or wait for the step."""
        self._waiting = trainer.state.fn == "fit" and trainer.fit_loop.epoch_loop._should_accumulate()
        if not self._waiting:
            super().on_validation_end(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save what waited, but not where Lightning has more to do first: a resumed run would leave that out."""
        loop = trainer.fit_loop.epoch_loop
        if not self._waiting or loop._should_accumulate() or loop._is_training_done:
            return
        if not loop._should_check_val_fx(trainer.fit_loop._data_fetcher):  # type: ignore[arg-type]
            self._waiting = False
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training is over: what follows can be done again from here."""
        self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save when a signal stopped training; see StopOnSignal."""
        if isinstance(exception, SIGTERMException):
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        path = Path(filepath)
        # a file was verified as it was written; a sharded folder goes past the CheckpointIO
        if trainer.is_global_zero and path.is_dir() and (reason := broken_shards(path)):
            raise not_saved(path, OSError(reason))
        for other in self.outdated(trainer, path):
            trainer.strategy.remove_checkpoint(other)

    def outdated(self, trainer: Trainer, newest: Path) -> list[Path]:
        """Checkpoints that go once `newest` is whole."""
        return [path for path in newest.parent.glob("epoch=*-step=*.ckpt") if path != newest]

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the folder says what is there."""
        return {}
