"""What a run records of its recipe."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.tensorboard.summary import hparams

from laco_train.checks import check_static
from laco_train.cli.resume import CONFIG_FILE, IN_USE, claim
from laco_train.errors import InputError
from laco_train.files import write_whole
from laco_train.settings import SECTIONS


@dataclass
class Taken:
    """What a run has for itself.

    Attributes:
        made: files and folders that were not there before, those inside others first.
        claimed: holds the run's own folder; None: not yet, or there is none.
    """

    made: list[Path] = field(default_factory=list)
    claimed: TextIO | None = None


def take_folder(trainer: Trainer, resumes: str | None) -> None:
    """Make the folder of a new run, for this run alone, before anything is written there. For rank 0.

    Args:
        resumes: the checkpoint that the run goes on from; a run may go on in the folder that holds it.

    Raises:
        InputError: it is another run's, or a CSVLogger's is.
    """
    taken = taken_by(trainer)
    if isinstance(trainer.logger, TensorBoardLogger) and trainer.logger._version is None:
        taken.made += _numbered(trainer.logger)
    elif trainer.log_dir is None:  # as in a fast_dev_run
        return
    else:
        folder = Path(trainer.log_dir)
        within = resumes is not None and folder.resolve() in Path(resumes).resolve().parents
        if (folder / CONFIG_FILE).exists() and not within:
            raise InputError("trainer.logger", f"puts this run into {folder}, which holds another; name another place")
        made = _made(folder)
        _refuse_file(folder)
        taken.made += made if (folder / IN_USE).exists() else [folder / IN_USE, *made]
        taken.claimed = claim(folder, "trainer.logger")
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger) and Path(logger.log_dir) != Path(str(trainer.log_dir)):
            taken.made += _of_csv(logger)


def taken_by(trainer: Trainer) -> Taken:
    """What the run has taken so far, as its RecordConfig keeps it; without one, nothing is kept."""
    return next((one.taken for one in trainer.callbacks if isinstance(one, RecordConfig)), Taken())  # type: ignore[attr-defined]


def make_numbered(logger: TensorBoardLogger) -> Path:
    """Make the folder of `logger`, which names no version, under the first number that no other process takes."""
    _numbered(logger)
    return Path(logger.log_dir)


def _numbered(logger: TensorBoardLogger | CSVLogger) -> list[Path]:
    while not (made := _made(Path(logger.log_dir))):
        _refuse_file(Path(logger.log_dir))
        logger._version = None
    return made


def _of_csv(logger: CSVLogger) -> list[Path]:
    """Make the folder of `logger`, which would delete what another run has logged there."""
    if logger._version is None:
        return _numbered(logger)
    made = _made(Path(logger.log_dir))
    problem = f"puts a CSVLogger into {logger.log_dir}, which is there already; name another version, or none"
    check_static("trainer.logger", bool(made), problem)
    return made


def _refuse_file(folder: Path) -> None:
    check_static("trainer.default_root_dir", folder.is_dir(), f"holds {folder}, which is no folder; remove it")


def _made(folder: Path) -> list[Path]:
    """Make it; returns it and those around it that were not there, or nothing if it was there."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return []
    except OSError as error:
        raise InputError(
            "trainer.default_root_dir", f"{folder} can't be made ({error.strerror}); name another"
        ) from error
    return missing


class RecordConfig(SaveConfigCallback):
    """Saves config.yaml once the run is sure to begin, so that input found bad until then leaves no trace.

    A resumed run keeps what it began with.

    Attributes:
        taken: see `take_folder`.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.taken = Taken()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Too early: the collapse may still refuse its input."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Model, data and collapse are ready: save the recipe, and show it in TensorBoard too."""
        log_dir = trainer.log_dir  # asks all processes
        if log_dir is None or not trainer.is_global_zero:
            return
        Path(log_dir).mkdir(parents=True, exist_ok=True)
        if self.taken.claimed is None:  # a second one would let go of the first
            self.taken.claimed = claim(Path(log_dir))
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
