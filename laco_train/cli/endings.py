"""How a run ends that does not get to its end: by a signal, or before it began."""

import signal
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn

from laco_train.callbacks.checkpoints import last_checkpoint
from laco_train.cli.loggers import remove_csv_folder, remove_empty
from laco_train.cli.resume import CONFIG_FILE


def ended_by_signal(trainer: Trainer, number: int) -> SystemExit:
    """What a shell would report of a process ended by signal `number`, so that a scheduler starts the job again."""
    if not trainer.is_global_zero:
        return SystemExit(0)  # Lightning kills rank 0 if another rank fails
    name = signal.Signals(number).name
    if trainer.state.fn == TrainerFn.FITTING:
        step, saved = trainer.global_step, last_checkpoint(trainer)
        print(f"{name}: stopped after step {step}, saved as {saved}; go on with --resume auto.", flush=True)
    else:
        print(f"{name}: stopped.", flush=True)
    return SystemExit(128 + number)


def leave_no_trace(trainer: Trainer, levels: int) -> None:
    """Remove the folder of a run that never began: Lightning opens the event file before the model is there.

    Args:
        levels: folders that the run's own path has, itself included, that nothing else may need.
    """
    if not isinstance(trainer.logger, TensorBoardLogger) or not trainer.is_global_zero:
        return
    folder = Path(trainer.logger.log_dir)  # trainer.log_dir would ask the other ranks, which may be gone
    if (folder / CONFIG_FILE).exists():
        return
    trainer.logger.finalize("failed")
    for events in folder.glob("events.*"):
        events.unlink()
    remove_empty(folder, levels)
    for logger in trainer.loggers:
        remove_csv_folder(logger)
