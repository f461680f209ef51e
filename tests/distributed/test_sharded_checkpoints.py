"""Checkpoints of FSDP2, as a folder of shards and as one file: resume, export and validation go on from both."""

import io
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import metadata

from laco_train.errors import InputError
from laco_train.training import sharded
from laco_train.training.checkpoint import read_checkpoint
from laco_train.training.sharded import SafeReader, ShardedWeights, is_sharded
from tests.cli.runs import Run, same_bytes
from tests.distributed.conftest import DATA, FSDP2, ONE_FILE, TORCHRUN, Ranks, losses


@pytest.fixture(scope="module")
def in_one_file(ranks: Ranks) -> Run:
    return ranks.fit(*FSDP2, ONE_FILE)


def weights(run: Run) -> dict[str, torch.Tensor]:
    return dict(read_checkpoint(run.checkpoint()).state_dict)


def same_weights(one: Run, other: Run) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert [name for name, value in first.items() if not torch.equal(value, second[name])] == []


def test_both_kinds_hold_the_same(fsdp2: Run, in_one_file: Run) -> None:
    assert is_sharded(fsdp2.checkpoint()) and in_one_file.checkpoint().is_file()
    same_weights(fsdp2, in_one_file)
    one, other = (read_checkpoint(run.checkpoint()) for run in (fsdp2, in_one_file))
    assert (one.steps, one.tokens, one.losses, one.model) == (other.steps, other.tokens, other.losses, other.model)
    assert len(one.plan.lineage) == 4


def test_a_resume_from_shards_is_an_unbroken_run(ranks: Ranks, fsdp2: Run) -> None:
    resumed = ranks.fit(*FSDP2, "--ckpt_path", str(fsdp2.checkpoint(3)))
    same_weights(resumed, fsdp2)
    assert losses(resumed) == losses(fsdp2)
    same_bytes(resumed.folder / "export", fsdp2.folder / "export")


def test_a_resume_from_one_file_is_an_unbroken_run(ranks: Ranks, in_one_file: Run) -> None:
    resumed = ranks.fit(*FSDP2, ONE_FILE, "--ckpt_path", str(in_one_file.checkpoint(3)))
    same_weights(resumed, in_one_file)
    assert losses(resumed) == losses(in_one_file)


@pytest.mark.parametrize(
    ("during", "after"),
    # the ranks know of each other one step later; told during the last one, they know at its end
    [(2, 4), (5, 6)],
)
def test_a_run_stopped_by_a_signal_goes_on_from_its_shards(ranks: Ranks, fsdp2: Run, during: int, after: int) -> None:
    name = f"stopped_{during}"
    stop = ["--trainer.callbacks+=tests.distributed.faults.TerminatedAt", f"--trainer.callbacks.step={during}"]
    fit = ["fit", "--recipe", "tiny.yaml", *DATA, *FSDP2, *stop, "--name", name, "--resume", "auto"]
    first = ranks(*fit, launcher=TORCHRUN)
    assert f"SIGTERM: stopped after step {after}" in first.out, first.err
    (folder,) = (ranks.project.root / "lightning_logs" / name).glob("version_*")
    (left,) = folder.glob("checkpoints/*")
    assert is_sharded(left) and not (folder / "export").exists()
    second = ranks(*fit, launcher=TORCHRUN)
    assert second.code == 0, second.err
    assert left.name in second.out
    weights_file = Path("export") / "model.safetensors"
    assert (folder / weights_file).read_bytes() == (fsdp2.folder / weights_file).read_bytes()


def test_export_from_shards_is_the_export_of_the_run(ranks: Ranks, fsdp2: Run, tmp_path: Path) -> None:
    result = ranks.project("export", "--checkpoint", str(fsdp2.checkpoint()), "--output", str(tmp_path / "out"))
    assert result.code == 0, result.err
    same_bytes(tmp_path / "out", fsdp2.folder / "export")


def test_validate_reads_shards(ranks: Ranks, fsdp2: Run) -> None:
    arguments = ["--recipe", "tiny.yaml", "--data.validation_max_tokens=320", *FSDP2]
    result = ranks("validate", *arguments, "--ckpt_path", str(fsdp2.checkpoint()))
    assert result.code == 0, result.err
    assert f"{losses(fsdp2)[-1][2]:.10f}"[:10] in result.out


def test_a_resume_under_another_strategy_is_refused(ranks: Ranks, fsdp2: Run, in_one_file: Run) -> None:
    """The state of the optimizer would be that of other weights, or could not be read at all."""
    fit = ["fit", "--recipe", "tiny.yaml", "--ckpt_path"]
    plain = ranks.alone("--trainer.max_steps=1", "--export.enabled=false").checkpoint(1)
    for arguments, problem in (
        ([*fit, str(fsdp2.checkpoint())], "is in shards, which only trainer.strategy ModelParallelStrategy loads"),
        ([*fit, str(in_one_file.checkpoint())], "is of a run with trainer.strategy ModelParallelStrategy"),
        ([*fit, str(plain), *FSDP2], "is of a run without trainer.strategy ModelParallelStrategy"),
        (["validate", *fit[1:], str(fsdp2.checkpoint())], "is in shards"),
    ):
        result = ranks.project(*arguments)
        assert result.code == 2 and problem in result.err, result.err


def test_one_process_validates_what_two_ranks_wrote_in_one_file(ranks: Ranks, in_one_file: Run) -> None:
    arguments = ["--recipe", "tiny.yaml", "--data.validation_max_tokens=320"]
    result = ranks.project("validate", *arguments, "--ckpt_path", str(in_one_file.checkpoint()))
    assert result.code == 0, result.err
    assert f"{losses(in_one_file)[-1][2]:.10f}"[:7] in result.out


def test_names_come_without_reading_weights(fsdp2: Run, tmp_path: Path) -> None:
    broken = shutil.copytree(fsdp2.checkpoint(), tmp_path / "broken")
    for file in broken.glob("*.distcp"):
        file.write_bytes(b"")
    found = ShardedWeights(broken, "--checkpoint")
    assert set(found) == set(weights(fsdp2)) and len(found) == len(list(found))
    with pytest.raises(InputError, match=r"--checkpoint: .* has a damaged shard"):
        found["model.lm_head.weight"]


def test_a_missing_shard_is_refused_before_weights_are_read(fsdp2: Run, tmp_path: Path) -> None:
    broken = shutil.copytree(fsdp2.checkpoint(), tmp_path / "broken")
    next(broken.glob("__1_*.distcp")).unlink()
    with pytest.raises(InputError, match=r"shard __1_0\.distcp is missing"):
        read_checkpoint(broken)


class Evil:
    """What a pickle may do."""

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return print, ("code ran",)


@pytest.mark.parametrize("content", [pickle.dumps(Evil()), b"", pickle.dumps({"a": 1})], ids=["code", "empty", "other"])
def test_an_index_that_is_none_is_refused(
    content: bytes, fsdp2: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    (tmp_path / "meta.pt").write_bytes((fsdp2.checkpoint() / "meta.pt").read_bytes())
    with pytest.raises(InputError, match="damaged"):
        read_checkpoint(tmp_path)
    assert "code ran" not in capsys.readouterr().out


def test_the_safe_index_is_torchs(fsdp2: Run) -> None:
    folder = fsdp2.checkpoint()
    with (folder / ".metadata").open("rb") as file:
        assert SafeReader(folder).read_metadata().state_dict_metadata == pickle.load(file).state_dict_metadata


class _ByName:
    """Pickles as a call of getattr, as an Enum's member does in some versions of Python."""

    def __init__(self, owner: Any, name: str):
        self.asked = (owner, name)

    def __reduce__(self) -> Any:
        return getattr, self.asked


def test_an_index_may_name_members_of_enums_alone() -> None:
    kind = metadata._MEM_FORMAT_ENCODING
    member = next(iter(kind))
    assert sharded._IndexUnpickler(io.BytesIO(pickle.dumps(_ByName(kind, member.name)))).load() is member
    for owner, name in ((kind, "__class__"), (metadata.TensorProperties, "create_from_tensor")):
        with pytest.raises(pickle.UnpicklingError, match="which no checkpoint needs"):
            sharded._IndexUnpickler(io.BytesIO(pickle.dumps(_ByName(owner, name)))).load()
