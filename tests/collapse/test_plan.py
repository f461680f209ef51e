"""The plan as a file, as a record, and applied: to its own model bit for bit, to any other not at all."""

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from laco_train.collapse import CollapsePlan, apply_plan, collapse_model, fingerprint
from laco_train.errors import InputError
from laco_train.settings import CollapseSettings
from tests.collapse.helpers import ALL_KEPT, RULES, TEXTS, assert_same_weights, scramble

Json = dict[str, Any]
KEYS = {
    *("format_version", "source", "source_fingerprint", "dtype", "strategy", "round", "source_depth", "depth"),
    *("settings", "merge_rule", "merge_norms", "merges", "removed", "candidates", "lineage", "parameters"),
    *("calibration", "refined", "rounds"),
}


@st.composite
def plans(draw: st.DrawFn, written: Json) -> Json:
    """A valid plan of random merges and removals, followed step by step on a list of layers."""
    depth = draw(st.integers(2, 40))
    dropping = draw(st.booleans())
    layers = [[i] for i in range(depth)]
    merges = []
    for _ in range(draw(st.integers(0, 4))):
        if len(layers) < 2:
            break
        layer = draw(st.integers(0, len(layers) - 2))
        absorbed = draw(st.integers(1, len(layers) - 1 - layer))
        merges.append({"layer": layer, "absorbed": absorbed, "similarity": draw(st.floats(-1, 1))})
        for gone in [layers.pop(layer + 1) for _ in range(absorbed)]:
            layers[layer] += [] if dropping else gone
    held = {i for layer in layers for i in layer}
    tried = [{**m, "accepted": True, "seconds": draw(st.floats(0, 9)), "skipped": None, "score": None} for m in merges]
    return {
        **written,
        "source": draw(st.text()),
        "round": draw(st.integers(0, 3)),
        "source_depth": depth,
        "depth": len(layers),
        "merge_rule": "drop" if dropping else draw(st.sampled_from(["rdsc", "last", "mean"])),
        "merge_norms": draw(st.booleans()),
        "merges": merges,
        "candidates": tried,
        "removed": [i for i in range(depth) if i not in held],
        "lineage": layers,
        "calibration": draw(st.sampled_from([written["calibration"], None])),
    }


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_file_round_trip(written: Json, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    values = data.draw(plans(written))
    read = CollapsePlan.from_dict(values)
    assert read.to_dict() == values
    path = tmp_path_factory.mktemp("plan") / "collapse_plan.json"
    read.save(path)
    assert CollapsePlan.load(path) == read
    assert json.loads(path.read_text(encoding="utf-8")) == values
    assert [file.name for file in path.parent.iterdir()] == ["collapse_plan.json"]


def test_every_key_of_the_format(plan: CollapsePlan, written: Json, nine: LlamaForCausalLM) -> None:
    assert set(written) == KEYS
    assert all(set(merge) == {"layer", "absorbed", "similarity"} for merge in written["merges"])
    assert all({"layer", "absorbed", "similarity", "accepted", "seconds"} <= set(c) for c in written["candidates"])
    assert set(written["parameters"]) == {"before", "after", "ratio"}
    assert set(written["calibration"]) == {"samples", "tokens", "sha256", "loss_before", "loss_after", "seconds"}
    assert CollapsePlan.from_dict(written) == plan
    assert (plan.source, plan.source_fingerprint, plan.dtype) == ("tiny", fingerprint(nine), "float32")
    assert (plan.source_depth, plan.merge_rule, plan.merge_norms) == (9, "rdsc", False)
    assert written["settings"] == dataclasses.asdict(ALL_KEPT)


def test_indices_count_from_0_in_the_model_as_it_then_stood(plan: CollapsePlan) -> None:
    """9 layers, C = 3, I = 1, all kept: l = 6, then min(5, 7 - 3) = 4, then min(3, 5 - 3) = 2, below C no more."""
    assert [(m.layer, m.absorbed) for m in plan.merges] == [(5, 2), (3, 2), (1, 2)]
    assert [(c.layer, c.absorbed, c.accepted) for c in plan.candidates] == [(5, 2, True), (3, 2, True), (1, 2, True)]
    assert plan.lineage == ((0,), (1, 2, 3, 4, 5, 6, 7), (8,))
    assert (plan.depth, plan.removed) == (3, ())


def test_counts(plan: CollapsePlan, nine: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    layer = sum(p.numel() for p in nine.model.layers[0].parameters())
    before = sum(p.numel() for p in nine.parameters())
    assert (plan.parameters.before, plan.parameters.after) == (before, before - 6 * layer)
    assert plan.parameters.ratio == pytest.approx(6 * layer / before)
    assert plan.calibration is not None
    assert plan.calibration.samples == len(TEXTS)
    assert plan.calibration.seconds > sum(candidate.seconds for candidate in plan.candidates) > 0
    assert plan.calibration.tokens == sum(len(tiny_tokenizer(text)["input_ids"]) for text in TEXTS)


def test_plan_cannot_be_changed(plan: CollapsePlan) -> None:
    for value, name in ((plan, "depth"), (plan.merges[0], "layer"), (plan.parameters, "ratio")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, 1)
    assert all(isinstance(value, tuple) for value in (plan.merges, plan.removed, plan.candidates, plan.lineage))
    assert all(isinstance(layer, tuple) for layer in plan.lineage)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("merge_norms", [False, True])
def test_applied_to_its_source_gives_the_same_weights(
    nine: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    dtype: torch.dtype,
    rule: Any,
    merge_norms: bool,
) -> None:
    searched, source = copy.deepcopy(nine).to(dtype), copy.deepcopy(nine).to(dtype)
    wanted = dataclasses.replace(ALL_KEPT, merge_rule=rule, merge_norms=merge_norms)
    _, plan = collapse_model(searched, tiny_tokenizer, wanted)
    assert len(searched.model.layers) == 3
    plan.save(tmp_path / "plan.json")
    result = apply_plan(source, CollapsePlan.load(tmp_path / "plan.json"))
    assert result is source
    assert_same_weights(source, searched)
    assert source.config.to_dict() == searched.config.to_dict()


def test_saved_plan_instead_of_a_search(
    nine: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase, plan: CollapsePlan, tmp_path: Path
) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    replayed, source = copy.deepcopy(nine), copy.deepcopy(nine)
    seen: list[Any] = []
    _, used = collapse_model(replayed, tiny_tokenizer, CollapseSettings(plan=str(path)), on_candidate=seen.append)
    assert (used, seen) == (plan, [])
    assert_same_weights(replayed, apply_plan(source, plan))


@pytest.mark.parametrize("removed", [[2], [0, 8], [5, 3, 4]])
def test_named_layers_are_removed(
    nine: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase, removed: list[int]
) -> None:
    model = copy.deepcopy(nine)
    _, plan = collapse_model(model, tiny_tokenizer, CollapseSettings(remove=removed))
    kept = [i for i in range(9) if i not in removed]
    assert (plan.removed, plan.merges, plan.candidates) == (tuple(sorted(removed)), (), ())
    assert plan.lineage == tuple((i,) for i in kept)
    assert plan.depth == model.config.num_hidden_layers == len(model.model.layers) == len(kept)
    for layer, origin in zip(model.model.layers, kept, strict=True):
        assert_same_weights(layer, nine.model.layers[origin])
    again = copy.deepcopy(nine)
    assert_same_weights(apply_plan(again, CollapsePlan.from_dict(plan.to_dict())), model)


def one_bit_of_a_norm(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """`model` with the smallest change that there is."""
    weight = model.model.layers[4].input_layernorm.weight
    with torch.no_grad():
        weight[0] = torch.nextafter(weight[0], torch.tensor(9.0))
    return model


def one_dtype(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """`model` with one projection in another dtype."""
    model.model.layers[4].mlp.up_proj.to(torch.bfloat16)
    return model


def one_name(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """`model` with one projection under another name."""
    mlp = model.model.layers[4].mlp
    mlp.lift_proj = mlp.up_proj
    del mlp.up_proj
    return model


def one_shape(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """`model` with one more entry in its vocabulary."""
    model.resize_token_embeddings(model.config.vocab_size + 1)
    return model


def eight_layers(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """`model` without its last layer."""
    del model.model.layers[8]
    model.config.num_hidden_layers = 8
    return model


def other_projections(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """`model` after a training that left its norms alone, as adapters merged into it do."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("q_proj.weight"):
                weight += 1e-3
    return model


# Each changes just what it says, so that nothing else can give the difference away.
CHANGES = [
    eight_layers,
    one_bit_of_a_norm,
    one_dtype,
    one_name,
    one_shape,
    other_projections,
    lambda model: scramble(model, seed=21),
    lambda model: model.to(torch.bfloat16),
]


@pytest.mark.parametrize("change", CHANGES)
def test_refused_on_another_model(
    nine: LlamaForCausalLM, plan: CollapsePlan, change: Callable[[LlamaForCausalLM], LlamaForCausalLM]
) -> None:
    other = change(copy.deepcopy(nine))
    before = copy.deepcopy(other)
    with pytest.raises(InputError) as error:
        apply_plan(other, plan)
    assert error.value.key == "collapse.plan"
    assert_same_weights(other, before)
    assert other.config.to_dict() == before.config.to_dict()


def test_refused_on_what_it_made(nine: LlamaForCausalLM, plan: CollapsePlan) -> None:
    model = apply_plan(copy.deepcopy(nine), plan)
    with pytest.raises(InputError, match="9 layers"):
        apply_plan(model, plan)


def test_fingerprint_is_of_names_shapes_dtypes_norms_and_samples(nine: LlamaForCausalLM) -> None:
    own = fingerprint(nine)
    assert len(bytes.fromhex(own)) == 32
    assert fingerprint(copy.deepcopy(nine)) == own
    others = {fingerprint(change(copy.deepcopy(nine))) for change in CHANGES}
    assert len(others - {own}) == len(CHANGES)
