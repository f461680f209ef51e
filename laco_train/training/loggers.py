"""What module and callbacks log themselves goes to every logger of a run, as what Lightning logs does."""

from collections.abc import Mapping

from lightning.pytorch import Trainer


def log_to_all(trainer: Trainer, values: Mapping[str, float], step: int) -> None:
    """Log `values` at optimizer step `step`."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=step)
