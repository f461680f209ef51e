"""What is written is whole or not there, and what is not whole is told apart."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import save
from torch.distributed.checkpoint.metadata import MetadataIndex

from laco_train.training.checkpoint_io import VerifiedCheckpointIO, fault
from laco_train.training.module import CHECKPOINT_KEY
from laco_train.training.sharded import SafeReader

CONTENT: dict[str, Any] = {CHECKPOINT_KEY: {}, "global_step": 3, "state_dict": {"w": torch.arange(1000.0)}}


class Code:
    """What a checkpoint must not hold."""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints" / "a.ckpt"
    VerifiedCheckpointIO().save_checkpoint(CONTENT, path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As ModelParallelStrategy writes it, by one rank."""
    path = tmp_path / "a.ckpt"
    optimizer = {"state": {"w": {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "params": ["w"]}]}
    save({"state_dict": CONTENT["state_dict"], "optimizer_0": optimizer}, checkpoint_id=path, no_dist=True)
    torch.save({CHECKPOINT_KEY: {}, "global_step": 3}, path / "meta.pt")
    return path


def test_whole_ones_are_good(file: Path, folder: Path) -> None:
    assert fault(file) is None and fault(folder) is None
    assert [path.name for path in file.parent.iterdir()] == ["a.ckpt"]
    assert torch.equal(VerifiedCheckpointIO().load_checkpoint(file)["state_dict"]["w"], torch.arange(1000.0))


@pytest.mark.parametrize("left", [0.0, 0.01, 0.5, 0.99])
def test_file_cut_short(file: Path, left: float) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(left * len(data))])
    assert fault(file) is not None


def test_every_bit_of_a_tensor_counts(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert "damaged" in str(fault(file))


def test_file_of_another_program(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "b.ckpt")
    assert fault(tmp_path / "b.ckpt") == "it was not written by fit"


@pytest.mark.parametrize("name", ["meta.pt", ".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("how", ["missing", "cut short"])
def test_folder_that_is_not_whole(folder: Path, name: str, how: str) -> None:
    path = folder / name
    data = path.read_bytes()
    path.unlink()
    if how == "cut short":
        path.write_bytes(data[: len(data) // 2])
    assert fault(folder) is not None


def test_what_is_no_tensor_in_a_shard_counts(folder: Path) -> None:
    entry = MetadataIndex("optimizer_0.param_groups.0.lr")
    info = SafeReader(folder).read_metadata().storage_data[entry]
    data = bytearray((folder / info.relative_path).read_bytes())
    data[info.offset : info.offset + info.length] = bytes(info.length)
    (folder / info.relative_path).write_bytes(data)
    assert "its optimizer_0.param_groups.0.lr can't be read" in str(fault(folder))


def test_an_entry_of_a_shard_that_lies_nowhere(folder: Path) -> None:
    index = SafeReader(folder).read_metadata()
    del index.storage_data[MetadataIndex("optimizer_0.param_groups.0.params")]
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    assert "its shards can't be read" in str(fault(folder))


def test_code_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "c.ckpt"
    VerifiedCheckpointIO().save_checkpoint({**CONTENT, "code": Code()}, path)
    assert "can't be read" in str(fault(path))
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        VerifiedCheckpointIO().load_checkpoint(path, weights_only=False)
