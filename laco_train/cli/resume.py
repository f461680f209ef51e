"""`fit --resume auto`: which run goes on, from which checkpoint, and whether its recipe is still the same."""

import fcntl
import fnmatch
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import yaml

from laco_train.callbacks.event_files import EVENT_FILES, cut_event_files
from laco_train.errors import InputError
from laco_train.files import home
from laco_train.training.checkpoint_io import PARTIAL, fault, read_header

CONFIG_FILE = "config.yaml"
"""In a run's folder: the whole recipe as it ran; there once the run has begun."""
SUMMARY_FILE = "summary.json"
"""In a run's folder: its outcome; written last, so it is there once the run is finished."""
IN_USE = ".in_use"
"""In a run's folder: locked by the process that writes there."""
_OPTIONS = ("resume", "run", "name", "ckpt_path")

HARMLESS = {
    "data.num_workers": "the order of blocks does not depend on it",
    "evaluation.batch_size": "how many questions are answered at a time",
    "evaluation.suite": "where the questions are",
    "export.*": "only what is written at the end",
    "model.optimizer.max_skipped_steps": "when to give up, not what a step does",
    "trainer.barebones": "logging and checkpoints only",
    "trainer.default_root_dir": "where new runs go; this one stays where it is",
    "trainer.detect_anomaly": "checks only",
    "trainer.enable_*": "what is shown and kept",
    "trainer.inference_mode": "how gradients are left out of validation",
    "trainer.logger*": "where curves go beside the run's own",
    "trainer.log_every_n_steps": "how many points a curve has",
    "trainer.max_time": "when to stop; the schedule does not depend on it",
    "trainer.num_sanity_val_steps": "checks before training only",
    "trainer.profiler": "measures only",
}
"""Keys that may differ on resume, and why: none changes an update of the weights. All others are refused."""


class RunIsFinished(Exception):
    """Nothing is left to do: no error."""


@dataclass(frozen=True)
class EarlierRun:
    """A run to go on with.

    Attributes:
        folder: that of its config.yaml.
        checkpoint: the newest good one; None: it begins anew, in the same folder.
    """

    folder: Path
    checkpoint: Path | None

    def tidy(self) -> None:
        """Remove what a killed process left half done, and what it logged after the checkpoint. For rank 0 alone."""
        for partial in (*self.folder.glob("*.partial*"), *self.folder.glob(f"checkpoints/*{PARTIAL}")):
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
        lengths = {} if self.checkpoint is None else read_header(self.checkpoint).get(EVENT_FILES, {})
        cut_event_files(self.folder, lengths)


def earlier_run(runs: Path, folder: str | None, say: Callable[[str], None] = print) -> EarlierRun | None:
    """What `--resume auto` goes on with; None if no run has begun yet.

    Args:
        runs: where runs of the recipe are.
        folder: the run that --run names.
        say: called with a line for each checkpoint that is passed over.

    Raises:
        InputError: `folder` is no run.
    """
    if folder is not None:
        found = home(folder).resolve()
        if not (found / CONFIG_FILE).is_file():
            raise InputError("--run", f"{folder} is no run of fit: it has no {CONFIG_FILE}")
    else:
        begun = [path.parent for path in runs.glob(f"version_*/{CONFIG_FILE}")]
        if not begun:
            return None
        found = max(begun, key=_version)
    return EarlierRun(found, newest_good(found / "checkpoints", say))


def _version(folder: Path) -> int:
    number = folder.name.rpartition("_")[2]
    return int(number) if number.isdigit() else -1


def newest_good(folder: Path, say: Callable[[str], None] = print) -> Path | None:
    """The checkpoint of `folder` after the most optimizer steps that is whole; the newest of those, or None."""
    good = []
    for path in folder.glob("*.ckpt"):
        if reason := fault(path):
            say(f"Passing over {path}: {reason}")
        else:
            good.append((read_header(path)["global_step"], path.stat().st_mtime, path))
    return max(good)[2] if good else None


def refuse_other_recipe(run: EarlierRun, recipe: str) -> None:
    """InputError unless `recipe`, in YAML like config.yaml, is that of the run, harmless keys aside."""
    then = dict(_leaves(_recorded(run.folder / CONFIG_FILE)))
    now = dict(_leaves(yaml.safe_load(recipe)))
    absent = "(not there)"
    changes = [
        f"{key}: {then.get(key, absent)} -> {now.get(key, absent)}"
        for key in sorted(then.keys() | now.keys())
        if then.get(key, absent) != now.get(key, absent) and not is_harmless(key)
    ]
    if changes:
        raise InputError(
            "--resume",
            f"the recipe is not that of {run.folder}: {'; '.join(changes)}; undo this, or start a new run without it",
        )


def _recorded(path: Path) -> dict[str, Any]:
    """The recipe that a run kept; InputError if it is not what fit wrote."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError("--resume", f"{path} can't be read ({error}); the run can't be resumed") from None
    if not isinstance(values, dict):
        raise InputError("--resume", f"{path} holds no recipe; the run can't be resumed")
    return values


def is_harmless(key: str) -> bool:
    """Whether `key` may differ between a run and its resume."""
    return key in _OPTIONS or any(fnmatch.fnmatchcase(key, pattern) for pattern in HARMLESS)


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def check_options(resume: str | None, run: str | None, ckpt_path: str | None, own_logger: bool) -> None:
    """Refuse options that contradict each other.

    Raises:
        InputError: in one line.
    """
    if run is not None and resume is None:
        raise InputError("--run", "goes with --resume auto; add it")
    if resume is not None and ckpt_path is not None:
        raise InputError("--resume", "goes not with --ckpt_path; drop one")
    if resume is not None and own_logger:
        problem = (
            "goes on in the folder and curves of fit's own TensorBoardLogger; drop what trainer.logger puts for it"
        )
        raise InputError("--resume", problem)


def is_finished(folder: Path, exports: bool) -> bool:
    """Whether a run is at its end, its export included if it `exports`."""
    return (folder / SUMMARY_FILE).is_file() and (not exports or (folder / "export").is_dir())


def end_of(folder: Path) -> str:
    """That a finished run needs no resume, or how to go on with one that time ended."""
    try:
        summary = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        summary = {}
    if not summary.get("out_of_time"):
        return f"{folder} is finished: there is nothing to resume."
    last = newest_good(folder / "checkpoints")
    further = f"start a run with a longer one and --ckpt_path {last}" if last else "start a run with a longer one"
    return f"{folder} is finished: trainer.max_time ended it after step {summary['steps']}; to go further, {further}."


def claim(folder: Path, key: str = "--resume") -> TextIO:
    """Hold the run in `folder` for this process, until it ends in whatever way.

    Raises:
        InputError: another process on this machine holds it, or it can't be written to; `key` is the option to blame.
    """
    try:
        file = (folder / IN_USE).open("a", encoding="utf-8")
    except OSError as error:
        raise InputError(key, f"{folder} can't be written to ({error.strerror}); name another place") from None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock not inherited by loader processes
    except OSError:
        file.close()
        raise InputError(key, f"another process is writing {folder}; wait for its end") from None
    return file
