"""Each family of the table, on a tiny random model: collapse, reload, cache, training, adapters."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from laco_train.collapse import collapse_model, decoder_of, families
from laco_train.collapse.families import FAMILIES, families_table
from laco_train.errors import InputError
from laco_train.settings import CollapseSettings
from tests.collapse.helpers import RULES
from tests.collapse.tiny import (
    BREAKING,
    DEPTH,
    HEADS,
    LLAMA,
    SLIDING,
    STANDINS,
    TINY,
    assert_sound,
    assert_takes_lora,
    assert_trains,
    collapsed,
    logits,
    tiny,
)

ROOT = Path(__file__).parent.parent.parent
KINDS = [family.model_type for family in FAMILIES]
SUMMING = [rule for rule in RULES if rule != "drop"]


pytestmark = pytest.mark.usefixtures("modules_folder")


def holds_experts(model: PreTrainedModel) -> bool:
    return any("expert" in name for name, _ in model.named_modules())


def exercise(kind: str, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """What a row of the table promises."""
    for rule in RULES:
        model = tiny(kind)
        if holds_experts(model) and rule in SUMMING:
            with pytest.raises(InputError, match=r"^collapse\.merge_rule: .*aligned.*use drop"):
                collapsed(model, tokenizer, merge_rule=rule)
            continue
        plan = collapsed(model, tokenizer, merge_rule=rule)
        assert [candidate.skipped for candidate in plan.candidates] == [None] * len(plan.candidates)
        assert_sound(model, folder / rule, plan.depth)
        assert plan.depth == 4


@pytest.mark.parametrize("kind", KINDS)
def test_every_rule(kind: str, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    exercise(kind, tiny_tokenizer, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_deletion_that_breaks_the_pattern(kind: str, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Then trained on, in full and by adapters."""
    model = tiny(kind)
    plan = collapsed(model, tiny_tokenizer, remove=BREAKING)
    assert plan.removed == tuple(BREAKING)
    assert_sound(model, tmp_path, DEPTH - len(BREAKING))
    assert_trains(model)
    assert_sound(model, tmp_path / "trained", DEPTH - len(BREAKING))
    assert_takes_lora(model)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "gemma2", "gemma3_text", "smollm3", "cohere2", "gpt_oss"])
def test_the_deletion_breaks_the_pattern(kind: str, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """The config's own pattern for the new depth differs, and the entries that made it are still saved."""
    model = tiny(kind)
    collapsed(model, tiny_tokenizer, remove=BREAKING)
    fresh = tiny(kind, num_hidden_layers=DEPTH - len(BREAKING))
    lists = decoder_of(model).family.per_layer
    assert any(getattr(model.config, name) != getattr(fresh.config, name) for name in lists)


def test_dense_layers_among_experts_are_listed(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """Layers 1 and 5 hold experts: by a step of 2, less layer 3."""
    model = tiny("qwen3_moe")
    kinds = [holds_experts(layer) for layer in decoder_of(model).stack]
    assert kinds == [False, True, False, False, False, True]
    collapsed(model, tiny_tokenizer, remove=[0, 3])
    assert [holds_experts(layer) for layer in decoder_of(model).stack] == [True, False, False, True]
    assert (model.config.mlp_only_layers, model.config.decoder_sparse_step) == ([1, 2], 1)


def change(model_type: str, **changes: Any) -> list[families.Family]:
    return [dataclasses.replace(f, **changes) if f.model_type == model_type else f for f in FAMILIES]


WRONG_ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "layer types not cut": ("gemma3_text", {"per_layer": ()}),
    "layer types not cut, for Cohere2": ("cohere2", {"per_layer": ()}),
    "RoPE switches not cut": ("smollm3", {"per_layer": ("layer_types",)}),
    "dense layers not listed": ("qwen3_moe", {"dense_layers": None}),
    "experts not named": ("mixtral", {"experts": False}),
    "stack elsewhere": ("gpt2", {"stack": "model.layers"}),
    "no norm": ("opt", {"norm": None}),
    "norm elsewhere": ("gpt_neox", {"norm": "model.norm"}),
    "norm of the first layer": ("internlm2", {"norm": "model.layers.0.ffn_norm"}),
}


@pytest.mark.parametrize("case", WRONG_ROWS)
def test_a_wrong_row_fails(
    case: str, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The very test that each row passes."""
    kind, changes = WRONG_ROWS[case]
    monkeypatch.setattr(families, "FAMILIES", change(kind, **changes))
    with pytest.raises((InputError, AssertionError, pytest.fail.Exception)):
        exercise(kind, tiny_tokenizer, tmp_path)


# mixed types

ALTERNATING = ["gemma2", "gpt_oss"]


@pytest.mark.parametrize("kind", ["gemma3_text", "smollm3", "cohere2", "qwen3"])
def test_skip_shows_mixed_windows(kind: str, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny(kind)
    types = [decoder_of(model).layer_type(index) for index in range(DEPTH)]
    plan = collapsed(model, tiny_tokenizer, mixed_types="skip", similarity_threshold=1.0)  # no merge moves the layers
    for tried in plan.candidates:
        window = types[tried.layer : tried.layer + tried.absorbed + 1]
        if len(set(window)) > 1:
            assert tried.skipped == "layers of unlike types"
            assert (tried.similarity, tried.accepted) == (None, False)
        else:
            assert tried.skipped is None
    assert {tried.skipped for tried in plan.candidates} == {"layers of unlike types", None}


def test_all_windows_skipped(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny("gemma2")
    before = logits(model)
    with pytest.raises(InputError) as error:
        collapsed(model, tiny_tokenizer, mixed_types="skip")
    assert error.value.key == "collapse.mixed_types"
    assert "collapse.mixed_types to first" in str(error.value)
    assert "collapse.merge_rule to drop" in str(error.value)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("rule", SUMMING)
def test_first_collapses_a_small_gemma2(rule: str, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """The merged layer has the type of layer l, and the plan says that it was asked for."""
    model = tiny("gemma2")
    types = list(model.config.layer_types)
    plan = collapsed(model, tiny_tokenizer, merge_rule=rule)
    assert any(len({types[index] for index in layer}) > 1 for layer in plan.lineage)
    assert model.config.layer_types == [types[layer[0]] for layer in plan.lineage]
    assert plan.settings["mixed_types"] == "first"
    plan.save(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["settings"]["mixed_types"] == "first"
    again = tiny("gemma2")
    collapse_model(again, tiny_tokenizer, CollapseSettings(plan=str(tmp_path / "plan.json")))
    assert torch.equal(logits(model), logits(again))


@pytest.mark.parametrize("kind", ALTERNATING)
def test_drop_crosses_types(kind: str, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = tiny(kind)
    plan = collapsed(model, tiny_tokenizer, merge_rule="drop", mixed_types="skip")
    assert [candidate.skipped for candidate in plan.candidates] == [None] * len(plan.candidates)
    assert_sound(model, tmp_path, plan.depth)
    assert plan.depth < DEPTH


# families without a row

UNLISTED: dict[str, dict[str, Any]] = {
    "starcoder2": {**LLAMA, **SLIDING},
    "exaone4": {**HEADS, **SLIDING},
    "bloom": {},
}


@pytest.mark.parametrize("kind", UNLISTED)
def test_discovery(kind: str, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    assert kind not in KINDS
    model = tiny(kind, **UNLISTED[kind])
    plan = collapsed(model, tiny_tokenizer)
    assert decoder_of(model).family.note == "found by discovery"
    assert_sound(model, tmp_path / "merged", plan.depth)
    model = tiny(kind, **UNLISTED[kind])
    collapsed(model, tiny_tokenizer, remove=BREAKING)
    assert_sound(model, tmp_path / "removed", DEPTH - len(BREAKING))
    assert_takes_lora(model)


def test_discovery_finds_experts(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny("olmoe", **LLAMA, num_experts=4, num_experts_per_tok=2)
    with pytest.raises(InputError, match="aligned"):
        collapsed(model, tiny_tokenizer)
    assert collapsed(model, tiny_tokenizer, merge_rule="drop").depth < DEPTH


def test_table_names_every_family_once() -> None:
    assert len(set(KINDS)) == len(KINDS) >= 19
    assert set(KINDS) == set(TINY)
    table = families_table()
    assert all(table.count(f"| `{kind}` |") == 1 for kind in KINDS)
    assert all("stand-in" in line for line in table.splitlines() if any(f"`{kind}`" in line for kind in STANDINS))


def test_readme_shows_the_table() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = readme.partition("<!-- families -->")[2].partition("<!-- /families -->")[0]
    command = 'python -c "from laco_train.collapse.families import families_table as t; print(t())"'
    assert shown.strip() == families_table(), f"put what `{command}` prints between the markers"
