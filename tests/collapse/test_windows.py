"""Windows that can't merge: told before anything is computed, with the setting that helps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from laco_train.checks import check_collapse
from laco_train.collapse import decoder_of, make_plan
from laco_train.collapse.report import describe
from laco_train.collapse.windows import refuse_unmergeable
from laco_train.errors import InputError
from laco_train.settings import CollapseSettings
from tests.collapse.helpers import TEXTS, scramble
from tests.collapse.tiny import tiny

Llama = Callable[..., LlamaForCausalLM]
ANY_TYPES = "as their layers mix layer types: set collapse.mixed_types to first, or collapse.merge_rule to drop"


def settings(**values: Any) -> CollapseSettings:
    return CollapseSettings(**{"layers_per_merge": 2, "calibration": TEXTS, **values})


@pytest.mark.parametrize("strategy", ["laco", "greedy"])
@pytest.mark.parametrize("kind", ["smollm3", "cohere2"])
def test_a_depth_that_mixed_types_keep_out_of_reach(
    kind: str, strategy: str, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Six layers, the fourth of another type: windows around it are skipped, and no C makes up for that."""
    with pytest.raises(InputError, match=r"^collapse\.target_depth: ") as error:
        make_plan(tiny(kind), tiny_tokenizer, settings(strategy=strategy, target_depth=2, min_interval=1))
    assert f"windows are skipped, {ANY_TYPES}" in str(error.value)
    assert "raise C" not in str(error.value)


@pytest.mark.parametrize("strategy", ["laco", "greedy"])
def test_a_ratio_out_of_reach_names_its_own_key(
    strategy: str, tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    wanted = settings(strategy=strategy, target_ratio=0.3, lowest_layer=4)
    with pytest.raises(InputError, match=r"^collapse\.target_ratio: .*(raise C|lower L)"):
        make_plan(scramble(tiny_llama(), seed=1), tiny_tokenizer, wanted)


def unequal(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Every second layer has an output projection of its own width."""
    for layer in model.model.layers[::2]:
        mlp, width = layer.mlp, model.config.hidden_size
        mlp.gate_proj, mlp.up_proj = nn.Linear(width, 8, bias=False), nn.Linear(width, 8, bias=False)
        mlp.down_proj = nn.Linear(8, width, bias=False)
    return model


def test_windows_of_unequal_shapes(tiny_llama: Llama) -> None:
    decoder = decoder_of(unequal(tiny_llama()))
    with pytest.raises(InputError, match=r"^collapse\.merge_rule: every window of 2 layers .* set .* to drop$"):
        refuse_unmergeable(decoder, [settings()])
    refuse_unmergeable(decoder, [settings(merge_rule="drop")])


@pytest.mark.parametrize(
    ("values", "target", "mixed"),
    [
        ({"layers_per_merge": 4}, None, True),  # the fourth of six is in all three
        ({"layers_per_merge": 3}, None, False),
        ({"layers_per_merge": 4, "exact": True}, 5, False),  # the merge takes in one layer only
        ({"layers_per_merge": 4, "strategy": "greedy"}, None, False),  # windows of two are tried too
        ({"layers_per_merge": 2, "lowest_layer": 3}, None, True),
        ({"layers_per_merge": 2, "lowest_layer": 3, "highest_layer": 6, "mixed_types": "first"}, None, False),
        ({"layers_per_merge": 2, "highest_layer": 4}, None, False),
    ],
)
def test_only_windows_that_the_search_would_try_count(values: Any, target: int | None, mixed: bool) -> None:
    decoder = decoder_of(tiny("smollm3"))
    wanted = settings(**values)
    if not mixed:
        refuse_unmergeable(decoder, [wanted], target)
        return
    with pytest.raises(InputError, match=rf"every window of {wanted.layers_per_merge} layers mixes layer types"):
        refuse_unmergeable(decoder, [wanted], target)


def test_one_setting_of_several_that_works_suffices() -> None:
    decoder = decoder_of(tiny("smollm3"))
    refuse_unmergeable(decoder, [settings(layers_per_merge=c) for c in (3, 4)])
    with pytest.raises(InputError, match="every window of 4 or 5 layers"):
        refuse_unmergeable(decoder, [settings(layers_per_merge=c) for c in (4, 5)])


def test_no_weights_are_needed() -> None:
    with torch.device("meta"):
        empty = type(tiny("gemma2"))(tiny("gemma2").config)
    with pytest.raises(InputError, match=r"^collapse\.mixed_types: "):
        refuse_unmergeable(decoder_of(empty), [settings()])


def test_a_plan_tells_what_lets_skipped_windows_merge(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    plan = make_plan(tiny("smollm3"), tiny_tokenizer, settings(similarity_threshold=-1.0))
    assert plan.depth < 6
    assert [line for line in describe(plan) if "skipped" in line] == [f"  2 windows are skipped, {ANY_TYPES}"]


@pytest.mark.parametrize("key", ["strategy", "merge_rule"])
def test_a_name_that_is_none(key: str) -> None:
    """As the library is called; the command line knows the names itself."""
    with pytest.raises(InputError, match=rf"^collapse\.{key}: is 'best', which is none of .*"):
        check_collapse(settings(**{key: "best"}))
