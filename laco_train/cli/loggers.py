"""Which loggers a run has: fit's own TensorBoardLogger, and beside it those that the recipe names."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from laco_train.files import home


def logs_in(trainer: Mapping[str, Any]) -> Path:
    """Where runs go, by the recipe's section `trainer`; Lightning reads ``~`` as the user's folder too."""
    return home(trainer.get("default_root_dir") or ".") / "lightning_logs"


def replaces_own(named: Any) -> bool:
    """Whether `named`, the value of trainer.logger, leaves no place for fit's own logger."""
    return named is False or any(isinstance(logger, TensorBoardLogger) for logger in listed(named))


def loggers_of(named: Any, own: Callable[[], TensorBoardLogger]) -> list[Logger] | bool:
    """What the Trainer is given for `named`, the value of trainer.logger.

    A TensorBoardLogger comes first, as the first one's folder is the run's: fit's `own` unless the recipe names one.
    """
    if named is False:
        return False
    loggers = listed(named)
    if not replaces_own(named):
        loggers = [own(), *loggers]
    return sorted(loggers, key=lambda logger: not isinstance(logger, TensorBoardLogger))


def logger_in(folder: Path) -> TensorBoardLogger:
    """Fit's own, of the run in `folder`: lightning_logs/<name>/version_N."""
    return TensorBoardLogger(
        folder.parent.parent, name=folder.parent.name, version=folder.name, default_hp_metric=False
    )


def remove_csv_folder(logger: Logger) -> None:
    """Remove the folder that a CSVLogger opened for a run that never began."""
    if isinstance(logger, CSVLogger):
        remove_empty(Path(logger.log_dir), 3)  # save_dir/name/version_N


def remove_empty(folder: Path, levels: int) -> None:
    """Remove `folder` and what is above it, `levels` in all, as far as they are empty."""
    for empty in (folder, *folder.parents[: levels - 1]):
        if not empty.is_dir() or any(empty.iterdir()):
            return
        empty.rmdir()


def listed(named: Any) -> list[Any]:
    """What an option of the Trainer that takes one, several or a bool names."""
    if named is None or isinstance(named, bool):
        return []
    return list(named) if isinstance(named, list) else [named]
