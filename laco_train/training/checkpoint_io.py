"""Checkpoints that are whole or not there: written aside, flushed, verified, then renamed."""

import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from laco_train.errors import TrainingStopped
from laco_train.files import flush_folder
from laco_train.training.module import CHECKPOINT_KEY
from laco_train.training.sharded import META, SafeReader, pickles

PARTIAL = ".partial"
"""Ends the name of a checkpoint being written."""
_UNREADABLE = Exception
"""What reading bytes that are not those written raises: it has no end."""


class VerifiedCheckpointIO(TorchCheckpointIO):
    """Lightning's CheckpointIO for files on a local or mounted disk; reads with weights_only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write beside `path`, flush, read it back, rename; what was at `path` stays until then.

        Raises:
            TrainingStopped: the disk is full, or gave back other bytes; nothing partial is left.
        """
        path = Path(path)
        aside = path.with_name(path.name + PARTIAL)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with aside.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if reason := broken_records(aside):
                raise OSError(reason)
            aside.replace(path)
            flush_folder(path.parent)
        except (OSError, RuntimeError) as error:
            aside.unlink(missing_ok=True)
            raise not_saved(path, error) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Callable | None = lambda storage, _: storage, weights_only: Any = None
    ) -> dict[str, Any]:
        """Lightning's, but never runs code from the file."""
        return super().load_checkpoint(path, map_location, weights_only=True)


def not_saved(path: Path, error: BaseException) -> TrainingStopped:
    """What to raise if the checkpoint `path` could not be written."""
    # torch reports a failed write as a broken archive, raised while the system's own error was handled
    cause = error if isinstance(error, OSError) or error.__context__ is None else error.__context__
    reason = getattr(cause, "strerror", None) or " ".join(str(cause).split())
    return TrainingStopped(
        f"can't save {path} ({reason}); the checkpoint before it is kept: make room, then go on with --resume auto"
    )


def broken_records(path: Path) -> str | None:
    """Why the bytes of a checkpoint file are not those written; None if every record has its checksum.

    It reads the whole file: about a second for 2 GB in the page cache.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except _UNREADABLE as error:
        return f"it is cut short or damaged: {error}"
    return None if bad is None else f"its record {bad} is damaged"


def broken_shards(folder: Path) -> str | None:
    """Why a sharded folder is not whole, or can't be read without running code; None if all is there and safe.

    torch.distributed.checkpoint flushes the shards before it names them in the index, and ``meta.pt`` comes after.
    """
    if not (folder / META).is_file():
        return f"it was not finished: it has no {META}"
    try:
        stored = SafeReader(folder).read_metadata().storage_data
    except _UNREADABLE as error:
        return f"its index can't be read: {error}"
    for info in (stored or {}).values():
        shard = folder / info.relative_path
        if not shard.is_file() or shard.stat().st_size < info.offset + info.length:
            return f"its shard {shard.name} is missing or cut short"
    return _unsafe_pickle(folder) or broken_records(folder / META)


def _unsafe_pickle(folder: Path) -> str | None:
    """Why what is no tensor in the shards of `folder` can't be read with weights_only; None if all of it can.

    Lightning lets torch unpickle it freely when it loads the optimizer.
    """
    try:
        found = pickles(folder)
    except _UNREADABLE as error:
        return f"its shards can't be read: {error}"
    for name, content in found.items():
        try:
            torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except _UNREADABLE as error:
            return f"its {name} can't be read: {why_unreadable(io.BytesIO(content), error)}"
    return None


def fault(path: Path) -> str | None:
    """Why `path`, a file or a sharded folder, is no good checkpoint of fit; None if it is one."""
    if reason := broken_shards(path) if path.is_dir() else broken_records(path):
        return reason
    try:
        header = read_header(path)
    except _UNREADABLE as error:
        return f"it can't be read: {why_unreadable(path, error)}"
    ours = isinstance(header.get(CHECKPOINT_KEY), dict) and isinstance(header.get("global_step"), int)
    return None if ours else "it was not written by fit"


def why_unreadable(source: Path | io.BytesIO, error: BaseException) -> str:
    """What to say of a file, a sharded folder or a pickle that torch refused to read with weights_only by `error`."""
    if isinstance(source, Path) and source.is_dir():
        source = source / META
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(source)
    except _UNREADABLE:
        foreign = []
    if foreign:
        return f"it names {', '.join(sorted(foreign)[:3])}, and nothing in a checkpoint is run"
    return " ".join(str(error).split())[:200] or type(error).__name__


def read_header(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, read with weights_only: tensors of a file are mapped, those of a folder left out."""
    source = path / META if path.is_dir() else path
    found = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
    return found if isinstance(found, dict) else {}
