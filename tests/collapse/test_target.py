"""The search to a depth against brute force over all thresholds, and what contradicts a target."""

import copy
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from laco_train.checks import check_collapse
from laco_train.collapse import CollapsePlan, collapse_model, make_plan
from laco_train.collapse.report import asked_depth
from laco_train.errors import InputError
from laco_train.settings import CollapseSettings, ModelSettings
from laco_train.study.depths import depths_at
from tests.collapse.helpers import RULES, TEXTS, assert_same_weights, scramble, token_ids
from tests.collapse.tiny import tiny
from tests.oracles.strategies import Threshold, all_thresholds

Llama = Callable[..., LlamaForCausalLM]


def found(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, **values: Any) -> CollapsePlan:
    """The plan for a copy of `model`."""
    wanted = CollapseSettings(**{"calibration": TEXTS, **values})
    return collapse_model(copy.deepcopy(model), tokenizer, wanted)[1]


def no_near_ties(runs: list[Threshold]) -> None:
    """Draw again if rounding could decide between two thresholds."""
    seen = sorted({s for run in runs for s in run.similarities})
    assume(all(b - a > 1e-6 for a, b in pairwise(seen)))


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_highest_threshold_of_all(
    tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase, data: st.DataObject
) -> None:
    depth = data.draw(st.integers(4, 7))
    C = data.draw(st.integers(2, min(4, depth - 1)))
    letters = {"C": C, "L": data.draw(st.integers(1, depth - C)), "H": depth, "I": data.draw(st.integers(1, 3))}
    rule = data.draw(st.sampled_from(RULES))
    model = scramble(tiny_llama(layers=depth), data.draw(st.integers(0, 999)))
    runs = all_thresholds(model, token_ids(tiny_tokenizer, TEXTS), rule=rule, **letters)
    no_near_ties(runs)
    values = {
        "layers_per_merge": C,
        "lowest_layer": letters["L"],
        "min_interval": letters["I"],
        "merge_rule": rule,
    }
    for target in data.draw(st.sets(st.integers(1, depth - 1), min_size=1, max_size=2)):
        enough = [run for run in runs if run.depth <= target]
        if not enough:
            least = min(run.depth for run in runs)
            with pytest.raises(InputError, match=rf"^collapse\.target_depth: no .* {target} layers .* is {least};"):
                found(model, tiny_tokenizer, target_depth=target, **values)
            continue
        plan = found(model, tiny_tokenizer, target_depth=target, **values)
        assert [(m.layer, m.absorbed) for m in plan.merges] == enough[0].merges
        assert plan.depth == enough[0].depth
        # its threshold, given as such, gives the same plan
        again = found(model, tiny_tokenizer, similarity_threshold=plan.settings["similarity_threshold"], **values)
        assert again.merges == plan.merges
        assert plan.settings["similarity_threshold"] == pytest.approx(enough[0].T, abs=1e-5)


def test_depth_is_not_monotone(tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """Where a lower threshold leaves more layers a bisection goes wrong."""
    model = scramble(tiny_llama(layers=8), seed=11)
    runs = all_thresholds(model, token_ids(tiny_tokenizer, TEXTS), C=2, L=1, H=8, I=1, rule="drop")
    depths = [run.depth for run in runs]
    targets = [depth for depth, at_a_lower_threshold in pairwise(depths) if at_a_lower_threshold > depth]
    assert targets
    for target in targets:
        first = next(run for run in runs if run.depth <= target)
        values: dict[str, Any] = {"layers_per_merge": 2, "min_interval": 1, "merge_rule": "drop"}
        plan = found(model, tiny_tokenizer, target_depth=target, **values)
        assert [(m.layer, m.absorbed) for m in plan.merges] == first.merges


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_exact(tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase, data: st.DataObject) -> None:
    """Brute force again, by an Algorithm 1 that never absorbs more than the target leaves to absorb."""
    depth = data.draw(st.integers(4, 7))
    C = data.draw(st.integers(2, min(4, depth - 1)))
    interval = data.draw(st.integers(1, 3))
    target = data.draw(st.integers(1, depth - 1))
    model = scramble(tiny_llama(layers=depth), data.draw(st.integers(0, 999)))
    letters = {"C": C, "L": 1, "H": depth, "I": interval}
    runs = all_thresholds(model, token_ids(tiny_tokenizer, TEXTS), rule="mean", fewest=target, **letters)
    no_near_ties(runs)
    values = {"layers_per_merge": C, "min_interval": interval, "merge_rule": "mean"}
    enough = [run for run in runs if run.depth <= target]
    if not enough:
        with pytest.raises(InputError, match=r"^collapse\.target_depth: "):
            found(model, tiny_tokenizer, target_depth=target, exact=True, **values)
        return
    plan = found(model, tiny_tokenizer, target_depth=target, exact=True, **values)
    assert [(m.layer, m.absorbed) for m in plan.merges] == enough[0].merges
    assert plan.depth == target


def test_exact_meets_what_whole_merges_pass(tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    model = scramble(tiny_llama(layers=9), seed=1)
    values: dict[str, Any] = {"layers_per_merge": 4, "min_interval": 1, "target_depth": 7}
    assert found(model, tiny_tokenizer, **values).depth < 7
    plan = found(model, tiny_tokenizer, exact=True, **values)
    assert (plan.depth, [m.absorbed for m in plan.merges]) == (7, [2])


@pytest.mark.parametrize(("layers", "expected"), [(0.6, 7), (1.4, 7), (1.6, 6), (3.0, 5), (4.45, 4)])
def test_ratio_is_of_all_parameters_to_the_nearest_layer(
    tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase, layers: float, expected: int
) -> None:
    model = scramble(tiny_llama(layers=8), seed=2)
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    ratio = layers * layer / sum(p.numel() for p in model.parameters())
    values: dict[str, Any] = {"layers_per_merge": 2, "min_interval": 1, "exact": True}
    assert found(model, tiny_tokenizer, target_ratio=ratio, **values).depth == expected


@pytest.mark.parametrize("layers", [0.4, 7.6])
def test_ratio_of_no_layer_or_of_all(tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase, layers: float) -> None:
    model = scramble(tiny_llama(layers=8), seed=2)
    ratio = (
        layers * sum(p.numel() for p in model.model.layers[0].parameters()) / sum(p.numel() for p in model.parameters())
    )
    with pytest.raises(InputError, match=r"^collapse\.target_ratio: .* layers of 8, each"):
        found(model, tiny_tokenizer, target_ratio=ratio)


UNEQUAL = r": layers of this qwen3_moe differ in size \([\d,]+ to [\d,]+ parameters\), .*; set collapse\.target_depth$"


def test_a_ratio_of_unequal_layers_is_no_depth(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny("qwen3_moe")  # experts in two layers of six
    values: dict[str, Any] = {"strategy": "shortgpt", "calibration": TEXTS}
    with pytest.raises(InputError, match=rf"^collapse\.target_ratio{UNEQUAL}"):
        make_plan(model, tiny_tokenizer, CollapseSettings(target_ratio=0.2, **values))
    assert make_plan(model, tiny_tokenizer, CollapseSettings(target_depth=4, **values)).depth == 4


def test_a_study_of_ratios_refuses_unequal_layers_before_it_reads_weights(tmp_path: Path) -> None:
    tiny("qwen3_moe").config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=rf"^study\.ratios{UNEQUAL}"):
        depths_at([0.2], ModelSettings(str(tmp_path)))


@pytest.mark.parametrize(("layers", "asked"), [(1.0, 7), (2.4, 6), (3.0, 5)])
def test_a_ratio_is_told_as_the_depth_that_it_is(
    tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase, layers: float, asked: int
) -> None:
    model = scramble(tiny_llama(layers=8), seed=2)
    ratio = layers * sum(p.numel() for p in model.model.layers[0].parameters()) / model.num_parameters()
    plan = found(model, tiny_tokenizer, layers_per_merge=4, min_interval=1, target_ratio=ratio)
    assert asked_depth(plan) == asked >= plan.depth


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"target_depth": 4, "similarity_threshold": 0.5}, "collapse.target_depth"),
    ({"target_ratio": 0.2, "similarity_threshold": 0.5}, "collapse.target_ratio"),
    ({"target_depth": 4, "target_ratio": 0.2}, "collapse.target_depth"),
    ({"target_depth": 4, "plan": "plan.json"}, "collapse.target_depth"),
    ({"target_ratio": 0.2, "remove": [1]}, "collapse.target_ratio"),
    ({"exact": True}, "collapse.exact"),
    ({"exact": True, "similarity_threshold": 0.5}, "collapse.exact"),
    ({"target_depth": 0}, "collapse.target_depth"),
    ({"target_depth": 8}, "collapse.target_depth"),
    ({"target_depth": 9}, "collapse.target_depth"),
    ({"target_ratio": 0.0}, "collapse.target_ratio"),
    ({"target_ratio": 1.0}, "collapse.target_ratio"),
    ({"target_ratio": float("nan")}, "collapse.target_ratio"),
]


@pytest.mark.parametrize(("bad", "key"), CONTRADICTIONS, ids=str)
def test_contradictions_name_their_key(
    tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase, bad: dict[str, Any], key: str
) -> None:
    model = scramble(tiny_llama(layers=8), seed=3)
    before = copy.deepcopy(model)
    with pytest.raises(InputError) as error:
        collapse_model(model, tiny_tokenizer, CollapseSettings(calibration=TEXTS, **bad))
    assert error.value.key == key
    assert "\n" not in str(error.value)
    assert_same_weights(model, before)


def test_deeper_than_the_model_only_once_the_depth_is_known() -> None:
    check_collapse(CollapseSettings(target_depth=40))
    with pytest.raises(InputError, match=r"^collapse\.target_depth: is 40, but the model has only 30 layers"):
        check_collapse(CollapseSettings(target_depth=40), 30)


def test_runs_share_what_was_computed(tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """Many thresholds are tried, but a trial of a model that stood before costs no layer again."""
    model = scramble(tiny_llama(layers=8), seed=4)
    calls: list[int] = []
    model.model.layers[-1].register_forward_hook(lambda *_: calls.append(1))
    seen: list[Any] = []
    wanted = CollapseSettings(layers_per_merge=2, min_interval=1, target_depth=2, calibration=TEXTS)
    _, plan = collapse_model(model, tiny_tokenizer, wanted, on_candidate=seen.append)
    assert len(seen) > 2 * len(plan.candidates)
    assert len(calls) < len(seen)
