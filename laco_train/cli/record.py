"""What a run records of its recipe."""

from pathlib import Path
from typing import TextIO

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard.summary import hparams

from laco_train.checks import check_static
from laco_train.cli.resume import CONFIG_FILE, claim
from laco_train.errors import InputError
from laco_train.files import write_whole
from laco_train.settings import SECTIONS


def take_folder(trainer: Trainer, resumes: str | None) -> None:
    """Make the folder of a new run, for this run alone, before anything is written there. For rank 0.

    Args:
        resumes: the checkpoint that the run goes on from; a run may go on in the folder that holds it.

    Raises:
        InputError: it is another run's.
    """
    if isinstance(trainer.logger, TensorBoardLogger) and trainer.logger._version is None:
        make_numbered(trainer.logger)
        return
    if trainer.log_dir is None:  # as in a fast_dev_run
        return
    folder = Path(trainer.log_dir)
    within = resumes is not None and folder.resolve() in Path(resumes).resolve().parents
    if (folder / CONFIG_FILE).exists() and not within:
        raise InputError("trainer.logger", f"puts this run into {folder}, which holds another; name another place")
    _made(folder)
    _refuse_file(folder)


def make_numbered(logger: TensorBoardLogger) -> Path:
    """Make the folder of `logger`, which names no version, under the first number that no other process takes."""
    while not _made(Path(logger.log_dir)):
        _refuse_file(Path(logger.log_dir))
        logger._version = None
    return Path(logger.log_dir)


def _refuse_file(folder: Path) -> None:
    check_static("trainer.default_root_dir", folder.is_dir(), f"holds {folder}, which is no folder; remove it")


def _made(folder: Path) -> bool:
    """Make it; False: it was there."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return False
    except OSError as error:
        raise InputError(
            "trainer.default_root_dir", f"{folder} can't be made ({error.strerror}); name another"
        ) from error
    return True


class RecordConfig(SaveConfigCallback):
    """Saves config.yaml once the run is sure to begin, so that input found bad until then leaves no trace.

    A resumed run keeps what it began with.
    """

    claimed: TextIO | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Too early: the collapse may still refuse its input."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Model, data and collapse are ready: save the recipe, and show it in TensorBoard too."""
        log_dir = trainer.log_dir  # asks all processes
        if log_dir is None or not trainer.is_global_zero:
            return
        Path(log_dir).mkdir(parents=True, exist_ok=True)
        self.claimed = claim(Path(log_dir))
        path = Path(log_dir) / CONFIG_FILE
        if path.exists() and not self.overwrite:
            return
        write_whole(path, self.parser.dump(self.config, skip_unset=False))
        leaves = [(f"{name}.{key}", value) for name in SECTIONS for key, value in self.config[name].items()]
        values = {key: value if isinstance(value, int | float) else str(value) for key, value in leaves}
        for logger in trainer.loggers:
            logger.log_hyperparams(values)
        if isinstance(trainer.logger, TensorBoardLogger):  # which shows them beside a result only
            for summary in hparams(values, {"val/loss": 0}):
                trainer.logger.experiment._get_file_writer().add_summary(summary)
