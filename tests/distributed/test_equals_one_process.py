"""Two ranks take the optimizer steps of one process that accumulates two batches: same plan, same losses."""

import json
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from laco_train.training.checkpoint import read_checkpoint
from tests.cli.runs import Run, events, scalars
from tests.distributed.conftest import DDP, FSDP2, Ranks, losses

LORA = ["--model.method=lora", "--model.lora.rank=4"]


@pytest.fixture(scope="module")
def alone(ranks: Ranks) -> Run:
    return ranks.alone()


@pytest.fixture(scope="module")
def tied(ranks: Ranks, tiny_llama: Callable[..., LlamaForCausalLM], tiny_tokenizer: PreTrainedTokenizerFast) -> str:
    """Folder of a model whose head is its embeddings."""
    for part in (tiny_llama(tie_word_embeddings=True), tiny_tokenizer):
        part.save_pretrained(ranks.project.root / "tied")
    return "tied"


@pytest.fixture(scope="module")
def ddp(ranks: Ranks) -> Run:
    return ranks.fit(*DDP)


@pytest.fixture(params=["ddp", "fsdp2"])
def pair(request: pytest.FixtureRequest) -> Run:
    run: Run = request.getfixturevalue(request.param)
    return run


def same_curve(run: Run, alone: Run) -> None:
    """Steps and tokens equal, losses to float32 rounding, over a curve that moves far more than that."""
    found, expected = losses(run), losses(alone)
    assert [point[:2] for point in found] == [point[:2] for point in expected]
    assert len(expected) == 7
    assert [point[2] for point in found] == pytest.approx([point[2] for point in expected], rel=1e-6)
    assert abs(expected[0][2] - expected[-1][2]) > 0.01


def test_losses_are_those_of_one_process(pair: Run, alone: Run) -> None:
    same_curve(pair, alone)


def test_losses_before_training_are_those_of_one_process(pair: Run, alone: Run) -> None:
    found, expected = pair.summary()["losses"], alone.summary()["losses"]
    assert found.keys() == expected.keys() == {"original", "collapsed", "trained"}
    assert found == pytest.approx(expected, rel=1e-6)


def test_gradient_norms_are_those_of_one_process(pair: Run, alone: Run) -> None:
    """Over all shards and ranks, before clipping; some are clipped, as the run's limit is 1."""
    found, expected = (scalars(events(run.folder), "train/gradient_norm") for run in (pair, alone))
    assert [step for step, _ in found] == [step for step, _ in expected]
    assert [norm for _, norm in found] == pytest.approx([norm for _, norm in expected], rel=1e-5)
    assert max(norm for _, norm in expected) > 1.1


def test_the_plan_is_that_of_one_process(pair: Run, alone: Run) -> None:
    plans = [json.loads((run.folder / "collapse_plan.json").read_text()) for run in (pair, alone)]
    for plan in plans:
        for candidate in plan["candidates"]:
            del candidate["seconds"]
        del plan["calibration"]["seconds"]
    assert plans[0] == plans[1]


def test_the_search_ran_once(pair: Run) -> None:
    assert pair.result.out.count("Collapsed 6 layers to 4") == 1
    assert pair.result.out.count("Validation loss of the original model") == 1


def test_the_exports_are_alike(ddp: Run, fsdp2: Run) -> None:
    one, other = (load_file(run.folder / "export" / "model.safetensors") for run in (ddp, fsdp2))
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def lora_alone(ranks: Ranks) -> Run:
    return ranks.alone(*LORA)


@pytest.mark.parametrize("strategy", [DDP, FSDP2], ids=["ddp", "fsdp2"])
def test_lora_is_lora_alone(strategy: list[str], ranks: Ranks, lora_alone: Run) -> None:
    """Frozen weights beside trained ones: losses as in one process, adapters alone in the checkpoint, export merged."""
    run = ranks.fit(*strategy, *LORA)
    same_curve(run, lora_alone)
    held = [set(read_checkpoint(each.checkpoint()).state_dict) for each in (run, lora_alone)]
    assert held[0] == held[1] and all("lora_" in name for name in held[0])
    for file in ("adapter/adapter_model.safetensors", "export/model.safetensors"):
        one, other = load_file(run.folder / file), load_file(lora_alone.folder / file)
        assert one.keys() == other.keys()
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-6)


def test_last_layers_under_fsdp2_are_those_alone(ranks: Ranks, tied: str) -> None:
    """Whole blocks are frozen, and the head is the embeddings: on every rank one tensor, before and after sharding."""
    chosen = [f"--model.source={tied}", "--model.method=last_layers", "--model.last_layers=1"]
    sharded, alone = ranks.fit(*FSDP2, *chosen), ranks.alone(*chosen)
    same_curve(sharded, alone)
    one, other = (load_file(run.folder / "export" / "model.safetensors") for run in (sharded, alone))
    assert one.keys() == other.keys() and "lm_head.weight" not in one


def test_bfloat16_weights_under_fsdp2_learn_as_alone(ranks: Ranks) -> None:
    """A shard is rounded as its part of the whole; buffers stay float32 on every rank."""
    chosen = ["--trainer.precision=bf16-true", "--trainer.max_steps=4"]
    sharded, alone = ranks.fit(*FSDP2, *chosen), ranks.alone(*chosen)
    found, expected = ([loss for *_, loss in losses(run)] for run in (sharded, alone))
    assert found == pytest.approx(expected, rel=1e-6)
    assert found[0] - found[-1] > 0.05
    weights = load_file(sharded.folder / "export" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
