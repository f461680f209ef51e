"""One layer fitted to a block: which block, how well, and its weights in a file that the plan names."""

import copy
import dataclasses
import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from laco_train.collapse import CollapsePlan, apply_plan, collapse_model, decoder_of, fit
from laco_train.collapse.similarity import calibration_batch
from laco_train.collapse.walk import Walk
from laco_train.errors import InputError
from laco_train.settings import CollapseSettings
from tests.collapse.helpers import TEXTS, assert_same_weights, scramble, token_ids
from tests.collapse.tiny import assert_sound, tiny
from tests.oracles import strategies as oracle
from tests.oracles.layer_collapse import final_states, similarity

Llama = Callable[..., LlamaForCausalLM]
WANTED = CollapseSettings(strategy="streamline", target_depth=4, calibration=TEXTS)
Collapsed = tuple[LlamaForCausalLM, LlamaForCausalLM, CollapsePlan]


@pytest.fixture(scope="module")
def collapsed(tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase) -> Collapsed:
    """Seven layers, the four that streamline leaves of them, and its plan; tests work on copies."""
    original = scramble(tiny_llama(layers=7), seed=1)
    model, plan = collapse_model(copy.deepcopy(original), tiny_tokenizer, WANTED, source="tiny")
    return original, model, plan  # type: ignore[return-value]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("target", [1, 3, 5])
def test_block_of_highest_cosine(
    tiny_llama: Llama,
    tiny_tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    target: int,
) -> None:
    monkeypatch.setattr(fit, "STEPS", 2)
    original = scramble(tiny_llama(layers=6), seed)
    size = 6 - target + 1
    samples = token_ids(tiny_tokenizer, TEXTS)
    cosines = oracle.block_cosines(original, size, samples)
    first = cosines.index(max(cosines))
    model = copy.deepcopy(original)
    _, plan = collapse_model(model, tiny_tokenizer, dataclasses.replace(WANTED, target_depth=target))
    assert [c.score for c in plan.candidates] == pytest.approx(cosines, abs=1e-5)
    assert [(c.layer, c.absorbed, c.similarity) for c in plan.candidates if c.accepted] == [(first, size - 1, None)]
    assert [(m.layer, m.absorbed) for m in plan.merges] == [(first, size - 1)]
    assert plan.merges[0].similarity == pytest.approx(
        similarity(final_states(model, samples), final_states(original, samples)), abs=1e-5
    )
    block = tuple(range(first, first + size))
    assert plan.lineage == (*((i,) for i in range(first)), block, *((i,) for i in range(first + size, 6)))
    assert (plan.merge_rule, plan.removed, plan.depth) == ("fitted", (), target)
    for new, held in enumerate(plan.lineage):
        if len(held) == 1:
            assert_same_weights(model.model.layers[new], original.model.layers[held[0]])


def test_fit_is_adam_on_the_squared_error(tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    original = scramble(tiny_llama(layers=5), seed=2)
    walk = Walk(decoder_of(original), calibration_batch(tiny_tokenizer, TEXTS), WANTED)
    samples = token_ids(tiny_tokenizer, TEXTS)
    expected = oracle.fit_layer(original, 1, 3, samples, steps=fit.STEPS, rate=fit.LEARNING_RATE)
    weights, tokens = fit.fit_layer(walk, 1, 3)
    assert expected.after < 0.2 * expected.before
    for name, parameter in expected.layer.named_parameters():
        torch.testing.assert_close(weights[name], parameter.detach(), rtol=0, atol=2e-3)
    assert tokens == fit.STEPS * sum(len(ids) for ids in samples)
    assert_same_weights(original, scramble(tiny_llama(layers=5), seed=2))


def test_many_samples_are_read_in_parts(
    tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text too long for one step is read in turns, in order: three samples and then the fourth."""
    batch = calibration_batch(tiny_tokenizer, TEXTS)
    monkeypatch.setattr(fit, "_TOKENS_A_STEP", 3 * batch.input_ids.shape[1])
    walk = Walk(decoder_of(scramble(tiny_llama(layers=5), seed=3)), batch, WANTED)
    weights, tokens = fit.fit_layer(walk, 1, 2)
    assert tokens == fit.STEPS // 2 * batch.tokens
    states = walk.states()
    call = walk.original.calls[1]
    with torch.no_grad():
        output = torch.func.functional_call(walk.decoder.stack[1], weights, states[1], call.kwargs)
        before = walk.decoder.stack[1](states[1], **call.kwargs)
    for sample in range(4):
        counted = walk.mask[sample].bool()
        errors = [(o[sample] - states[3][sample])[counted].square().mean() for o in (output, before)]
        assert errors[0] < 0.4 * errors[1]


def test_nothing_is_drawn_at_random(
    collapsed: Collapsed, tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    original, model, plan = collapsed
    torch.manual_seed(99)
    again, second = collapse_model(copy.deepcopy(original), tiny_tokenizer, WANTED, source="tiny")
    assert_same_weights(again, model)
    assert second.refined is not None
    assert plan.refined is not None
    assert second.refined.sha256 == plan.refined.sha256
    for parameter in original.parameters():
        assert parameter.grad is None
        assert parameter.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plan_and_file_give_the_same_weights(
    tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, dtype: torch.dtype
) -> None:
    original = scramble(tiny_llama(layers=6), seed=4).to(dtype)
    model, plan = collapse_model(copy.deepcopy(original), tiny_tokenizer, WANTED)
    plan.save(tmp_path / "collapse_plan.json")
    assert plan.refined is not None
    assert sorted(file.name for file in tmp_path.iterdir()) == ["collapse_plan.json", plan.refined.file]
    content = (tmp_path / plan.refined.file).read_bytes()
    assert hashlib.sha256(content).hexdigest() == plan.refined.sha256
    layer = plan.merges[0].layer
    names = {f"model.layers.{layer}.{name}" for name, _ in original.model.layers[0].named_parameters()}
    tensors = safetensors.torch.load(content)
    assert set(tensors) == names
    for name, value in tensors.items():
        assert torch.equal(model.get_parameter(name), value)
        assert value.dtype == dtype
    read = CollapsePlan.load(tmp_path / "collapse_plan.json")
    assert read == plan
    assert_same_weights(apply_plan(copy.deepcopy(original), read), model)
    by_settings = collapse_model(
        copy.deepcopy(original), tiny_tokenizer, CollapseSettings(plan=str(tmp_path / "collapse_plan.json"))
    )
    assert_same_weights(by_settings[0], model)


def test_file_moves_with_the_plan(collapsed: Collapsed, tmp_path: Path) -> None:
    """Loaded and saved elsewhere, or sent to another process, the plan takes its weights along."""
    original, model, plan = collapsed
    plan.save(tmp_path / "plan.json")
    (tmp_path / "elsewhere").mkdir()
    CollapsePlan.load(tmp_path / "plan.json").save(tmp_path / "elsewhere" / "plan.json")
    moved = CollapsePlan.load(tmp_path / "elsewhere" / "plan.json")
    for each in (moved, pickle.loads(pickle.dumps(plan))):
        assert_same_weights(apply_plan(copy.deepcopy(original), each), model)


def test_json_holds_no_weights(collapsed: Collapsed) -> None:
    plan = collapsed[2]
    values = plan.to_dict()
    assert set(values["refined"]) == {"file", "sha256", "tokens", "seconds", "refinement"}
    assert "refined_weights" not in values
    read = CollapsePlan.from_dict(json.loads(json.dumps(values)))
    assert read == plan
    assert read.refined_weights is None
    assert len(repr(plan)) < 20_000


def test_weights_that_follow_need_no_file(collapsed: Collapsed, tmp_path: Path) -> None:
    """A resume or an export loads every weight from its checkpoint: the shape is all that the plan must give."""
    original, model, plan = collapsed
    plan.save(tmp_path / "plan.json", weights=False)
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]
    alone = CollapsePlan.load(tmp_path / "plan.json")
    untouched = copy.deepcopy(original)
    with pytest.raises(InputError, match=r"^collapse\.plan: its weights are in refined-.* which is missing"):
        apply_plan(untouched, alone)
    assert_same_weights(untouched, original)
    shaped = apply_plan(untouched, alone, weights_follow=True)
    assert shaped.config.to_dict() == model.config.to_dict()
    shaped.load_state_dict(model.state_dict())
    assert_same_weights(shaped, model)


def test_wrong_file_is_refused(collapsed: Collapsed, tmp_path: Path) -> None:
    plan = collapsed[2]
    plan.save(tmp_path / "plan.json")
    assert plan.refined is not None
    beside = tmp_path / plan.refined.file
    content = bytearray(beside.read_bytes())
    content[-1] ^= 1
    beside.write_bytes(content)
    with pytest.raises(InputError, match=r"^collapse\.plan: .*sha256 is not"):
        CollapsePlan.load(tmp_path / "plan.json")
    beside.unlink()
    beside.mkdir()
    with pytest.raises(InputError, match=r"^collapse\.plan: "):
        CollapsePlan.load(tmp_path / "plan.json")


def with_tensors(plan: CollapsePlan, content: bytes) -> CollapsePlan:
    """`plan` with other weights, their sha256 right."""
    from laco_train.collapse.plan import Refined

    return dataclasses.replace(plan, refined=Refined.of(content, 1, 0.0), refined_weights=content)


@pytest.mark.parametrize(
    "content",
    [
        b"no tensors",
        safetensors.torch.save({"model.layers.4.mlp.up_proj.weight": torch.zeros(64, 32)}),
        safetensors.torch.save({"model.layers.0.mlp.up_proj.weight": torch.zeros(32, 64)}),
        safetensors.torch.save({"model.layers.0.mlp.lift_proj.weight": torch.zeros(64, 32)}),
    ],
    ids=["no safetensors", "no such layer", "another shape", "another name"],
)
def test_weights_that_do_not_fit_touch_nothing(collapsed: Collapsed, content: bytes) -> None:
    original, _, plan = collapsed
    untouched = copy.deepcopy(original)
    with pytest.raises(InputError, match=r"^collapse\.plan: "):
        apply_plan(untouched, with_tensors(plan, content))
    assert_same_weights(untouched, original)
    assert untouched.config.to_dict() == original.config.to_dict()


def test_a_file_without_a_fitted_weight_is_refused(collapsed: Collapsed) -> None:
    original, _, plan = collapsed
    assert plan.refined_weights is not None
    tensors = safetensors.torch.load(plan.refined_weights)
    absent = f"model.layers.{plan.merges[0].layer}.input_layernorm.weight"
    del tensors[absent]
    untouched = copy.deepcopy(original)
    with pytest.raises(InputError, match=rf"^collapse\.plan: refined-.* lacks {absent}"):
        apply_plan(untouched, with_tensors(plan, safetensors.torch.save(tensors)))
    assert_same_weights(untouched, original)


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.update(refined=None),
        lambda v: v["refined"].update(file="../refined.safetensors"),
        lambda v: v["refined"].update(file="plan.json"),
        lambda v: v["refined"].update(tokens="many"),
        lambda v: v["refined"].pop("sha256"),
        lambda v: v["refined"].update(refinement={"tokens": 3}),
        lambda v: v["refined"].update(refinement={"tokens": "3", "seconds": 0.0}),
        lambda v: v.update(refined_weights="AAAA"),
        lambda v: v.update(merge_rule="drop"),
    ],
)
def test_inconsistent_record_is_refused(collapsed: Collapsed, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(json.dumps(collapsed[2].to_dict()))
    assert CollapsePlan.from_dict(values)
    change(values)
    with pytest.raises(InputError):
        CollapsePlan.from_dict(values)


@pytest.mark.parametrize("kind", ["gemma2", "gpt2", "opt", "mixtral", "gpt_oss"])
def test_other_families(tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, kind: str) -> None:
    """Whatever a family passes to its layers; experts are fitted like anything else, as nothing is summed."""
    model = tiny(kind)
    _, plan = collapse_model(model, tiny_tokenizer, WANTED)
    assert plan.merge_rule == "fitted"
    assert_sound(model, tmp_path, 4)
