"""What keeps processes apart that work at the arms of one study at the same time, on one machine."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from laco_train.errors import InputError


def alone(folder: Path, name: Literal["journal", "report"]) -> FileLock:
    """To be held while what all processes write in the study's `folder` is read and written; others wait."""
    return FileLock(folder / f".{name}.lock")


@contextmanager
def holding(folder: Path, arms: Sequence[str]) -> Iterator[None]:
    """Keep `arms` of the study in `folder` for this process, however it ends.

    Raises:
        InputError: another process has one of them.
    """
    with ExitStack() as held:
        with alone(folder, "journal"):  # else one that only asks whether an arm is held would look like its holder
            for arm in arms:
                try:
                    held.enter_context(_lock(folder, arm))
                except Timeout:
                    raise _taken(folder, arm) from None
        yield


def refuse_held(folder: Path, arms: Sequence[str]) -> None:
    """InputError if another process has one of `arms`; writes nothing."""
    for arm in arms:
        if is_held(folder, arm):
            raise _taken(folder, arm)


def is_held(folder: Path, arm: str) -> bool:
    """Whether another process works at `arm`."""
    lock = _lock(folder, arm)
    if not Path(lock.lock_file).exists():
        return False
    try:
        with lock:
            return False
    except Timeout:
        return True


def _lock(folder: Path, arm: str) -> FileLock:
    return FileLock(folder / f".{arm}.lock", timeout=0)


def _taken(folder: Path, arm: str) -> InputError:
    problem = f"another process is writing this arm of {folder}; wait for its end, or name others with --arms"
    return InputError(f"study.arms.{arm}", problem)
