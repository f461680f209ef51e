"""How a run ends that does not get to its end: by a signal, or before it began."""

import signal
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn

from laco_train.callbacks.checkpoints import last_checkpoint
from laco_train.cli.loggers import remove_csv_folder, remove_empty
from laco_train.cli.record import taken_by
from laco_train.cli.resume import CONFIG_FILE, IN_USE, claim
from laco_train.errors import InputError


def ended_by_signal(trainer: Trainer, number: int) -> SystemExit:
    """What a shell would report of a process ended by signal `number`, so that a scheduler starts the job again."""
    if not trainer.is_global_zero:
        return SystemExit(0)  # Lightning kills rank 0 if another rank fails
    name = signal.Signals(number).name
    if trainer.state.fn == TrainerFn.FITTING:
        saved = last_checkpoint(trainer)
        kept = f"saved as {saved}; go on with --resume auto" if isinstance(saved, Path) else "without a checkpoint"
        print(f"{name}: stopped after step {trainer.global_step}, {kept}.", flush=True)
    else:
        print(f"{name}: stopped.", flush=True)
    return SystemExit(128 + number)


def leave_no_trace(trainer: Trainer, levels: int) -> None:
    """Remove the folder of a run that never began: Lightning opens the event file before the model is there.

    Args:
        levels: folders that the run's own path has, itself included, that nothing else may need.
    """
    if not trainer.is_global_zero:
        return
    own, taken = trainer.logger, taken_by(trainer)
    if not isinstance(own, TensorBoardLogger) and taken.claimed is None:
        return
    # trainer.log_dir would ask the other ranks, which may be gone
    folder = Path(own.log_dir if isinstance(own, TensorBoardLogger) else trainer.default_root_dir)
    if (folder / CONFIG_FILE).exists() or not _is_free(folder):
        return
    files = [path for path in taken.made if path.is_file()]
    if isinstance(own, TensorBoardLogger):
        own.finalize("failed")
        files += folder.glob("events.*")
    for file in files:
        file.unlink()
    if isinstance(own, TensorBoardLogger):
        remove_empty(folder, levels)
    for made in taken.made:
        remove_empty(made, 1)
    for logger in trainer.loggers:
        remove_csv_folder(logger)


def _is_free(folder: Path) -> bool:
    """Whether no other process is about to run in `folder`; this one no longer is."""
    if not folder.is_dir():
        return True
    mark = folder / IN_USE
    there = mark.exists()
    try:
        claim(folder).close()
    except InputError:
        return False
    if not there:
        mark.unlink()
    return True
