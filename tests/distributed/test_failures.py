"""What goes wrong with two ranks is told once, in one line, and no process stays behind."""

import shutil
from pathlib import Path

import pytest

from tests.cli.runs import Result
from tests.distributed.conftest import DDP, FSDP2, STRATEGY, TORCHRUN, Ranks


def told(result: Result) -> list[str]:
    """Lines of the program itself about what went wrong."""
    return [line for line in result.err.splitlines() if line.startswith("laco_train:")]


def refused(result: Result, *parts: str) -> None:
    assert result.code == 2, result.err
    (line,) = told(result)
    assert all(part in line for part in parts), line
    assert "Traceback" not in result.err


def test_what_rank_zero_finds_alone_ends_all(ranks: Ranks) -> None:
    """Only rank 0 reads weights; the others wait for its plan."""
    broken = ranks.project.root / "broken"
    shutil.copytree(ranks.project.root / "model", broken)
    content = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(content[: len(content) // 2])
    before = ranks.versions()
    refused(
        ranks("fit", "--recipe", "tiny.yaml", *DDP, "--model.source=broken"), "model.source: can't read the weights"
    )
    assert ranks.versions() == before


def test_what_every_rank_finds_is_told_once(ranks: Ranks) -> None:
    """Under torchrun, which ends with a report and a code of its own."""
    result = ranks("fit", "--recipe", "tiny.yaml", *FSDP2, "--data.batch_size=100", launcher=TORCHRUN)
    assert result.code != 0
    (line,) = told(result)
    assert line.startswith("laco_train: error: data.batch_size") and "2 devices" in line


def test_what_another_rank_finds_alone_ends_all(ranks: Ranks) -> None:
    """Lightning or torchrun ends rank 0, which waits for the others; its code is not that of the fault."""
    result = ranks("fit", "--recipe", "tiny.yaml", *DDP, "--trainer.callbacks+=tests.distributed.faults.FailOn",
                   "--trainer.callbacks.rank=1", launcher=TORCHRUN)  # fmt: skip
    assert result.code != 0
    assert told(result) == ["laco_train: error: data.train: is not on the machine of rank 1"]


def test_an_export_that_fails_at_the_end_ends_all(ranks: Ranks) -> None:
    """Every rank has gathered its share by then; rank 0 fails alone, and the checkpoint stays."""
    shutil.copytree(ranks.project.root / "model", ranks.project.root / "lost")
    before = set(ranks.versions())
    fault = ["--trainer.callbacks+=tests.distributed.faults.LoseSource", "--trainer.callbacks.folder=lost"]
    refused(ranks("fit", "--recipe", "tiny.yaml", *FSDP2, "--model.source=lost", *fault), "model.source", "lost")
    (folder,) = set(ranks.versions()) - before
    assert not (folder / "export").exists()
    assert list(folder.glob("checkpoints/*.ckpt/meta.pt")) != []


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--trainer.strategy=fsdp"], ["trainer.strategy: fsdp", "ModelParallelStrategy"]),
        (["--trainer.strategy=deepspeed_stage_3"], ["trainer.strategy: deepspeed", "ModelParallelStrategy"]),
        (
            [f"--trainer.strategy={STRATEGY}", "--trainer.strategy.save_distributed_checkpoint=false"],
            ["tensor_parallel_size is auto", "data_parallel_size: 2"],
        ),
        (
            [
                f"--trainer.strategy={STRATEGY}",
                "--trainer.strategy.data_parallel_size=4",
                "--trainer.strategy.tensor_parallel_size=1",
            ],
            ["data_parallel_size is 4, but there are 2 processes"],
        ),
    ],
    ids=["fsdp1", "deepspeed", "sizes left open", "wrong size"],
)
def test_a_strategy_that_is_not_supported_is_refused_before_processes_start(
    arguments: list[str], parts: list[str], ranks: Ranks
) -> None:
    result = ranks.project("fit", "--recipe", "tiny.yaml", "--trainer.devices=2", *arguments)
    refused(result, *parts)
    assert "Initializing distributed" not in result.err


def test_no_process_is_left(ranks: Ranks) -> None:
    """After all of the above: none runs in this project's folder."""
    left = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").resolve() == ranks.project.root and b"laco_train" in (
                process / "cmdline"
            ).read_bytes():
                left.append(process.name)
        except OSError:
            continue
    assert left == []
