"""The CPU recipe on a tiny seeded model gives the losses of losses.json.

A change that is meant to change numbers regenerates the file, and says so in its commit:
    LACO_TRAIN_GOLDEN=write pytest tests/golden
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.cli.runs import events, make_project, scalars

GOLDEN = Path(__file__).with_name("losses.json")
RECIPE = "smollm2_135m_collapse_cpu"
TINY = {
    "model.source": "model",
    "data.block_size": "64",
    "data.max_tokens": "8192",
    "data.validation_max_tokens": "2048",
    "trainer.accelerator": "cpu",
    "trainer.max_steps": "5",
    "trainer.val_check_interval": "2",
    "trainer.log_every_n_steps": "1",
    "export.enabled": "false",
}


@pytest.fixture(scope="module")
def losses(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> dict[str, list[float]]:
    """By curve, from a run in float32 on one thread."""
    assert torch.get_num_threads() == 1
    project = make_project(tmp_path_factory.mktemp("golden"), tiny_llama(layers=8, hidden=64), tiny_tokenizer)
    options = [f"--{key}={value}" for key, value in TINY.items()]
    result = project("fit", "--recipe", RECIPE, *options)
    assert result.code == 0, result.err
    seen = events(project.root / "lightning_logs" / RECIPE / "version_0")
    tags = ("train/loss", "val/loss_original", "val/loss")
    return {tag: [loss for _, loss in scalars(seen, tag)] for tag in tags}


def test_losses_are_the_golden_ones(losses: dict[str, list[float]]) -> None:
    if os.environ.get("LACO_TRAIN_GOLDEN") == "write":
        GOLDEN.write_text(json.dumps(losses, indent=1) + "\n", encoding="utf-8")
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert losses.keys() == golden.keys()
    for curve, expected in golden.items():
        assert losses[curve] == pytest.approx(expected, rel=1e-4), curve


def test_golden_run_collapses_and_learns(losses: dict[str, list[float]]) -> None:
    assert [len(losses[tag]) for tag in ("train/loss", "val/loss")] == [5, 4]
    assert losses["val/loss"][0] != pytest.approx(losses["val/loss_original"][0], rel=1e-3)
    assert losses["val/loss"][-1] < losses["val/loss"][0] - 0.1
