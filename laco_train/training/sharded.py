"""Reads a sharded checkpoint, the folder that ModelParallelStrategy writes, in one process and without running code.

The folder holds ``.metadata`` (a pickle: which tensor lies where), a ``.distcp`` file of tensors from each rank, and
``meta.pt`` with all else. torch unpickles ``.metadata`` freely; here only the classes that it needs are let in.
"""

import io
import os
import pickle
import warnings
from collections.abc import Iterator, Mapping
from enum import EnumType
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, Metadata, load, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from laco_train.errors import InputError

META = "meta.pt"
INDEX = ".metadata"
_WEIGHTS = "state_dict."
_RECORDS = "torch.distributed.checkpoint.metadata"
_NAMES = {
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
}


def _member(kind: Any, name: str) -> Any:
    if isinstance(kind, EnumType) and name in kind.__members__:
        return kind[name]
    raise pickle.UnpicklingError(f"{INDEX} asks for {name!r} of something, which no checkpoint needs")


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _NAMES:
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):  # 3.11.2, of Debian 12, pickles members of an Enum by it
            return _member
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        record = vars(metadata).get(name) if module == _RECORDS else None
        if isinstance(record, type) and record.__module__ == _RECORDS:  # and nothing that the module imports
            return record
        raise pickle.UnpicklingError(f"{INDEX} names {module}.{name}, which no checkpoint needs")


class SafeReader(FileSystemReader):
    """torch's reader of such a folder, but for the index, which is read with known classes only."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index of the folder.

        Raises:
            pickle.UnpicklingError: it is none, or names what no checkpoint needs.
        """
        with (Path(self.path) / INDEX).open("rb") as file:
            index = _IndexUnpickler(file).load()
        if not isinstance(index, Metadata):
            raise pickle.UnpicklingError(f"{INDEX} holds no index")
        index.storage_meta = index.storage_meta or StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index


class _Unopened(DefaultLoadPlanner):
    """Takes what is no tensor as it stands in the files, where torch would unpickle it freely."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.original_state_dict[read_item.dest_index.fqn] = value.getvalue()


def _fill(wanted: dict[str, Any], folder: Path, planner: DefaultLoadPlanner | None = None) -> None:
    """Put what `folder` holds under the names of `wanted` there; raises what reading it raised."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it is meant to be
        try:
            load(wanted, storage_reader=SafeReader(folder), planner=planner, no_dist=True)
        except CheckpointException as error:  # no Exception itself
            raise next(iter(error.failures.values()))[0] from None


def pickles(folder: Path) -> dict[str, bytes]:
    """What a sharded folder holds that is no tensor, such as learning rates: pickles by name, none of them opened.

    Raises:
        OSError, LookupError, pickle.UnpicklingError and others: the index, or a file that it names, is damaged.
    """
    entries = SafeReader(folder).read_metadata().state_dict_metadata
    found: dict[str, Any] = {name: None for name, kind in entries.items() if isinstance(kind, BytesStorageMetadata)}
    _fill(found, folder, _Unopened())
    return found


class ShardedWeights(Mapping[str, Tensor]):
    """Weights of a sharded checkpoint by name, each read whole, on the CPU, when it is asked for.

    Args:
        folder: the checkpoint.
        key: the option that named it.

    Raises:
        OSError, pickle.UnpicklingError: the index is missing or damaged.
    """

    def __init__(self, folder: Path, key: str):
        self.folder, self.key = folder, key
        index = SafeReader(folder).read_metadata()
        self._entries = {
            name.removeprefix(_WEIGHTS): entry
            for name, entry in index.state_dict_metadata.items()
            if name.startswith(_WEIGHTS) and isinstance(entry, TensorStorageMetadata)
        }

    def __getitem__(self, name: str) -> Tensor:
        """One tensor, put together from its shards.

        Raises:
            InputError: a shard is damaged.
        """
        entry = self._entries[name]
        wanted = {_WEIGHTS + name: torch.empty(entry.size, dtype=entry.properties.dtype)}
        try:
            _fill(wanted, self.folder)
        except Exception as error:  # what reading other bytes than those written raises has no end
            reason = str(error).partition("\n")[0]
            problem = f"{self.folder} has a damaged shard ({reason}); name another .ckpt"
            raise InputError(self.key, problem) from error
        return wanted[_WEIGHTS + name]

    def __iter__(self) -> Iterator[str]:
        """Names, in the order of the model."""
        return iter(self._entries)

    def __len__(self) -> int:
        """Number of tensors."""
        return len(self._entries)


def is_sharded(path: Path) -> bool:
    """Whether `path` is a folder with an index of shards."""
    return os.path.isfile(path / INDEX)


def read_sharded(folder: Path, key: str) -> dict[str, Any]:
    """What ``torch.load`` gives for a checkpoint in one file, but for the optimizer's state, which is left out.

    Args:
        folder: the checkpoint.
        key: the option that named it.

    Raises:
        OSError, RuntimeError, pickle.UnpicklingError: a file is missing or damaged.
    """
    values: dict[str, Any] = torch.load(folder / META, map_location="cpu", weights_only=True)
    return {**values, "state_dict": ShardedWeights(folder, key)}
