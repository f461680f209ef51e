"""A folder that appears whole or not at all: written aside, given its manifest, then renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from laco_train.errors import InputError, TrainingStopped
from laco_train.files import flush_folder, home
from laco_train.manifest import write_manifest


def refuse_nonempty(output: Path, key: str) -> None:
    """InputError, naming `key`, unless a folder can be made at `output` without touching what is there."""
    target = home(output).resolve()
    if target.is_mount():
        raise InputError(key, f"{output} is a mount point, which can't be renamed to; name a folder inside it")
    if target.is_dir() and any(target.iterdir()):
        raise InputError(key, f"{output} exists and is not empty; name another folder or empty it")
    if target.exists() and not target.is_dir():
        raise InputError(key, f"{output} is a file; name a folder")
    parent = next(parent for parent in target.parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(key, f"no folder can be made in {parent}; name one that you may write to")


@contextmanager
def appearing_whole(output: Path, export: dict[str, Any]) -> Iterator[Path]:
    """A folder beside `output` to write to; if the block succeeds it gets its manifest and its name, else it goes.

    Args:
        output: its name in the end.
        export: what the manifest tells of it.

    Raises:
        TrainingStopped: the manifest can't be written, or the folder not be renamed.
    """
    target = home(output).resolve()
    aside = target.with_name(f"{target.name}.partial-{os.getpid()}")
    if aside.exists():  # left by a dead run that had the same process id
        shutil.rmtree(aside)
    aside.mkdir(parents=True)
    try:
        yield aside
        try:
            write_manifest(aside, export)
            aside.replace(target)
            flush_folder(target.parent)
        except OSError as error:
            raise TrainingStopped(f"export: can't finish {output}: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
