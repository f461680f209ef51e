"""Tasks and samples in a run of two ranks are those of one process."""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.conftest import DDP, FSDP2, Ranks, losses
from tests.distributed.test_equals_one_process import tied
from tests.evaluation.conftest import mini_suite

__all__ = ["mini_suite", "tied"]

pytest.importorskip("lm_eval", reason="the extra evaluation")

LORA = ["--model.method=lora", "--model.lora.rank=4"]


@pytest.fixture(scope="module")
def asked(mini_suite: Path) -> list[str]:
    """Options of two tasks at three moments, and samples."""
    tasks = ["--evaluation.tasks=[piqa,boolq]", "--evaluation.at=[0,0.5,1]", f"--evaluation.suite={mini_suite}"]
    return [*tasks, "--evaluation.samples=true"]


@pytest.mark.parametrize("strategy", [DDP, FSDP2], ids=["ddp", "fsdp2"])
def test_found_is_what_one_process_finds_and_changes_no_step(strategy: list[str], ranks: Ranks, asked: Any) -> None:
    plain, run = ranks.fit(*strategy, *LORA), ranks.fit(*strategy, *LORA, *asked)
    assert losses(run) == losses(plain)
    alone = ranks.alone(*LORA, *asked)
    found, expected = run.summary(), alone.summary()
    assert [one["step"] for one in found["evaluation"]] == [0, 0, 3, 3, 6, 6]
    assert found["evaluation"] == expected["evaluation"]
    assert found["samples"] == expected["samples"]
    assert list(found["samples"]) == ["prompts", "original", "collapsed", "trained"]
    assert run.result.out.count("Accuracy after 0 tokens") == 1


def test_every_weight_of_a_sharded_model_with_tied_embeddings(ranks: Ranks, asked: Any, tied: str) -> None:
    found = [make(f"--model.source={tied}", *asked) for make in (lambda *o: ranks.fit(*FSDP2, *o), ranks.alone)]
    first, second = (run.summary() for run in found)
    assert first["evaluation"] == second["evaluation"]
    assert first["samples"] == second["samples"]
