"""Keeps the curves of a resumed run in one piece: every point once, at every axis."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from laco_train.training.loggers import log_to_all

EVENT_FILES = "event_files"
"""Key in a checkpoint: length in bytes of each event file of its run, by name, as the checkpoint was saved."""
_UNLOGGED = "unlogged"
"""Key in a checkpoint saved as a batch ends: what Lightning logs right after it, and at which step."""


class MarkEventFiles(Callback):
    """Notes in each checkpoint how far the event files reach, so that a resumed run can cut what it will log again.

    TensorBoard's purge_step knows one axis only: it would purge curves over tokens by their number of steps, and what
    is logged at the step of the checkpoint belongs in part before it and in part after it.
    """

    def __init__(self) -> None:
        self._unlogged: tuple[dict[str, float], int] | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Flush, then measure."""
        logger = trainer.logger
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            logger.experiment.flush()
            files = Path(logger.log_dir).glob("events.*")
            checkpoint[EVENT_FILES] = {file.name: file.stat().st_size for file in files}
            checkpoint[_UNLOGGED] = _unlogged(trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember what the run had no time to log."""
        self._unlogged = checkpoint.get(_UNLOGGED)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log it."""
        if self._unlogged is not None:
            log_to_all(trainer, *self._unlogged)
            self._unlogged = None


def _unlogged(trainer: Trainer) -> tuple[dict[str, float], int] | None:
    loop, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
    progress: Any = loop.batch_progress.current
    if progress.completed == progress.processed or loop._should_accumulate() or not connector.should_update_logs:
        return None
    values = {name: float(value) for name, value in connector.metrics["log"].items()}
    return {**values, "epoch": float(trainer.current_epoch)}, loop._batches_that_stepped


def cut_event_files(folder: Path, lengths: dict[str, int]) -> None:
    """Take the event files of `folder` back to `lengths`; those without one go."""
    for file in folder.glob("events.*"):
        if file.name not in lengths:
            file.unlink()
        elif file.stat().st_size > lengths[file.name]:
            with file.open("r+b") as opened:
                opened.truncate(lengths[file.name])
