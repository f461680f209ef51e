"""What an exported folder holds, by size and sha256, so that damage shows without loading it; imports nothing heavy."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from laco_train import __version__
from laco_train.errors import InputError
from laco_train.files import open_up, write_whole

MANIFEST = "laco_train_manifest.json"
"""Name of the manifest in an exported folder."""
FORMAT_VERSION = 1


@dataclass(frozen=True)
class FileSum:
    """What a file is known by.

    Attributes:
        size: bytes.
        sha256: of its bytes, in hex.
    """

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What `write_manifest` wrote.

    Attributes:
        export: what the export is of, as the caller of `write_manifest` told it.
        files: every file but the manifest, by its path in the folder.
    """

    export: dict[str, Any]
    files: dict[str, FileSum]


def write_manifest(folder: Path, export: dict[str, Any]) -> None:
    """Write the manifest of all files in `folder`, once they are sure to be on the disk, and not their owner's alone.

    Args:
        folder: complete but for the manifest.
        export: what it is an export of, as JSON.

    Raises:
        OSError: a file can't be read, or the manifest not be written.
    """
    for path in _files(folder):
        open_up(folder / path)
    files = {str(path): _sum(folder / path, flush=True) for path in _files(folder)}
    values = {
        "format_version": FORMAT_VERSION,
        "laco_train": __version__,
        "export": export,
        "files": {name: {"size": one.size, "sha256": one.sha256} for name, one in files.items()},
    }
    write_whole(folder / MANIFEST, json.dumps(values, indent=1) + "\n")


def read_manifest(folder: Path, key: str) -> Manifest:
    """The manifest of `folder`.

    Raises:
        InputError: there is none, or it is damaged; `key` is the option to blame.
    """
    path = folder / MANIFEST
    if not path.is_file():
        exported = folder / "export"  # of a run
        told = (
            f"its export is {exported}" if (exported / MANIFEST).is_file() else "name a folder that laco_train exported"
        )
        raise InputError(key, f"{folder} has no {MANIFEST}; {told}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values["format_version"]
        if version != FORMAT_VERSION:
            raise InputError(key, f"{path} is of format {version}, not {FORMAT_VERSION}; update laco_train")
        files = {_inside(name): FileSum(int(one["size"]), str(one["sha256"])) for name, one in values["files"].items()}
        return Manifest(dict(values["export"]), files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(key, f"{path} is damaged ({type(error).__name__}: {error}); export again") from None


def faults(folder: Path, manifest: Manifest) -> dict[str, str]:
    """Files of `folder` that are not as `manifest` has them, by path, each with what is wrong in words."""
    found = {}
    for name, expected in manifest.files.items():
        if problem := _fault(folder / name, expected):
            found[name] = problem
    return found


def unlisted(folder: Path, manifest: Manifest) -> list[str]:
    """Files in `folder` that the manifest does not know."""
    return [str(path) for path in _files(folder) if str(path) not in manifest.files]


def _fault(path: Path, expected: FileSum) -> str | None:
    if not path.is_file():
        return "is missing"
    try:
        size = path.stat().st_size
        if size != expected.size:
            return f"has {size:,} bytes, not {expected.size:,}"
        if _sum(path, flush=False) != expected:
            return "has other content than was exported (sha256)"
    except OSError as error:
        return f"can't be read ({error.strerror})"
    return None


def _files(folder: Path) -> list[PurePosixPath]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return sorted(name for path in paths if str(name := PurePosixPath(path.relative_to(folder))) != MANIFEST)


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{name} lies outside the folder")
    return name


def _sum(path: Path, *, flush: bool) -> FileSum:
    with path.open("rb") as stream:
        if flush:
            os.fsync(stream.fileno())
        return FileSum(os.fstat(stream.fileno()).st_size, hashlib.file_digest(stream, "sha256").hexdigest())
