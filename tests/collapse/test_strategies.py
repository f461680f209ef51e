"""Every way to choose layers against its slow oracle, and the plan that each gives."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from laco_train.collapse import CollapsePlan, apply_plan, collapse_model
from laco_train.collapse.strategies import STRATEGIES
from laco_train.errors import InputError
from laco_train.settings import CollapseSettings
from tests.collapse.helpers import RULES, TEXTS, assert_same_weights, scramble, token_ids
from tests.oracles import strategies as oracle
from tests.oracles.layer_collapse import without

Llama = Callable[..., LlamaForCausalLM]
RIVALS = ("shortgpt", "angular", "sleb", "tail", "streamline")


def searched(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, strategy: str, **values: Any
) -> tuple[LlamaForCausalLM, CollapsePlan]:
    """A collapsed copy of `model`, and its plan."""
    wanted = CollapseSettings(strategy=strategy, **{"calibration": TEXTS, **values})  # type: ignore[arg-type]
    return collapse_model(copy.deepcopy(model), tokenizer, wanted, source="tiny")  # type: ignore[return-value]


def assert_removed(model: LlamaForCausalLM, plan: CollapsePlan, original: LlamaForCausalLM, removed: list[int]) -> None:
    """`plan` removes just these layers, and `model` is `original` without them."""
    assert plan.removed == tuple(sorted(removed))
    assert (plan.merges, plan.merge_rule, plan.refined) == ((), "drop", None)
    assert plan.lineage == tuple((i,) for i in range(plan.source_depth) if i not in removed)
    assert plan.depth == len(model.model.layers) == plan.source_depth - len(removed)
    assert_same_weights(model, without(original, removed))


def no_ties(values: list[float], count: int = 1) -> None:
    """Draw again if rounding could decide which `count` are the lowest."""
    low = sorted(values)
    assume(count >= len(low) or low[count] - low[count - 1] > 1e-5)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999), depth=st.integers(2, 6), texts=st.sampled_from([TEXTS, TEXTS[:1], TEXTS[::-1]]))
def test_shortgpt(
    tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase, seed: int, depth: int, texts: list[str]
) -> None:
    model = scramble(tiny_llama(layers=depth), seed)
    influences = oracle.block_influences(model, token_ids(tiny_tokenizer, texts))
    for target in {1, depth // 2, depth - 1} - {0}:
        count = depth - target
        no_ties(influences, count)
        lowest = sorted(range(depth), key=lambda layer: influences[layer])[:count]
        result, plan = searched(model, tiny_tokenizer, "shortgpt", target_depth=target, calibration=texts)
        assert_removed(result, plan, model, lowest)
        assert [c.score for c in plan.candidates] == pytest.approx(influences, abs=1e-5)
        assert [(c.layer, c.absorbed, c.accepted) for c in plan.candidates] == [
            (layer, 0, layer in lowest) for layer in range(depth)
        ]


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 999), depth=st.integers(2, 7), data=st.data())
def test_angular(
    tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase, seed: int, depth: int, data: st.DataObject
) -> None:
    target = data.draw(st.integers(1, depth - 1))
    model = scramble(tiny_llama(layers=depth), seed)
    distances = oracle.angular_distances(model, depth - target, token_ids(tiny_tokenizer, TEXTS))
    no_ties(distances)
    first = distances.index(min(distances))
    result, plan = searched(model, tiny_tokenizer, "angular", target_depth=target)
    assert_removed(result, plan, model, list(range(first, first + depth - target)))
    assert [c.score for c in plan.candidates] == pytest.approx(distances, abs=1e-5)
    assert [(c.layer, c.absorbed) for c in plan.candidates if c.accepted] == [(first, depth - target - 1)]


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 999), depth=st.integers(2, 6), data=st.data())
def test_sleb(
    tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase, seed: int, depth: int, data: st.DataObject
) -> None:
    target = data.draw(st.integers(1, depth - 1))
    model = scramble(tiny_llama(layers=depth), seed)
    expected = oracle.sleb(model, token_ids(tiny_tokenizer, TEXTS), target)
    for losses in expected.losses:
        no_ties(losses)
    result, plan = searched(model, tiny_tokenizer, "sleb", target_depth=target)
    assert_removed(result, plan, model, expected.order)
    flat = [value for step in expected.losses for value in step]
    assert [c.score for c in plan.candidates] == pytest.approx(flat, abs=1e-5)
    taken = [step.index(min(step)) for step in expected.losses]
    assert [c.layer for c in plan.candidates if c.accepted] == taken
    assert plan.calibration is not None
    assert plan.calibration.loss_after == pytest.approx(min(expected.losses[-1]), abs=1e-5)


@pytest.mark.parametrize("target", range(1, 6))
def test_tail(tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase, target: int) -> None:
    model = scramble(tiny_llama(layers=6), seed=2)
    result, plan = searched(model, tiny_tokenizer, "tail", target_depth=target)
    assert_removed(result, plan, model, list(range(target - 1, 5)))
    assert plan.candidates == ()


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_greedy(tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase, data: st.DataObject) -> None:
    depth = data.draw(st.integers(3, 7))
    C = data.draw(st.integers(2, min(4, depth - 1)))
    highest = data.draw(st.integers(C + 1, depth))
    lowest = data.draw(st.integers(1, highest - C))
    rule = data.draw(st.sampled_from(RULES))
    criterion = data.draw(st.sampled_from(["similarity", "loss"]))
    by_threshold = criterion == "similarity" and data.draw(st.booleans())
    fewest = depth - (highest - 1 - lowest)  # all that windows may hold has become one layer
    target = None if by_threshold else data.draw(st.integers(fewest, depth - 1))
    exact = target is not None and data.draw(st.booleans())
    T = data.draw(st.floats(-0.2, 1))
    model = scramble(tiny_llama(layers=depth), data.draw(st.integers(0, 999)))
    expected = oracle.greedy(
        model,
        token_ids(tiny_tokenizer, TEXTS),
        C=C,
        lowest=lowest,
        highest=highest,
        rule=rule,
        criterion=criterion,
        target=target,
        T=T,
        exact=exact,
    )
    for step in expected.steps:
        no_ties([w.loss if criterion == "loss" else -w.similarity for w in step])
        assume(not by_threshold or abs(max(w.similarity for w in step) - T) > 1e-4)
    result, plan = searched(
        model,
        tiny_tokenizer,
        "greedy",
        layers_per_merge=C,
        lowest_layer=lowest,
        highest_layer=highest,
        merge_rule=rule,
        criterion=criterion,
        target_depth=target,
        similarity_threshold=T if by_threshold else None,
        exact=exact,
    )
    assert [(m.layer, m.absorbed) for m in plan.merges] == [(w.layer, w.absorbed) for w in expected.taken]
    windows = [w for step in expected.steps for w in step]
    assert [(c.layer, c.absorbed) for c in plan.candidates] == [(w.layer, w.absorbed) for w in windows]
    assert [c.similarity for c in plan.candidates] == pytest.approx([w.similarity for w in windows], abs=1e-5)
    if criterion == "loss":
        assert [c.score for c in plan.candidates] == pytest.approx([w.loss for w in windows], abs=1e-5)
    assert_same_weights(result, expected.model)
    if target is not None:
        assert plan.depth <= target
        assert plan.depth == target or not exact


def test_greedy_ends_where_no_window_is_above_the_threshold(
    tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    model = scramble(tiny_llama(layers=5), seed=3)
    _, plan = searched(model, tiny_tokenizer, "greedy", layers_per_merge=2, similarity_threshold=1.0)
    assert (plan.depth, plan.merges, len(plan.candidates)) == (5, (), 3)
    assert plan.settings["similarity_threshold"] == 1.0


def test_greedy_says_what_it_can_reach(tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    model = scramble(tiny_llama(layers=6), seed=3)
    with pytest.raises(InputError, match=r"^collapse\.target_depth: .* 4 layers .* not 2;"):
        searched(model, tiny_tokenizer, "greedy", layers_per_merge=2, lowest_layer=3, target_depth=2)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_plan_is_whole(
    tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, strategy: str
) -> None:
    """Each gives a plan that, once saved and loaded, makes the same model of the source, and counts what it took."""
    model = scramble(tiny_llama(layers=7), seed=4)
    result, plan = searched(model, tiny_tokenizer, strategy, layers_per_merge=2, target_depth=4)
    assert (plan.strategy, plan.source_depth) == (strategy, 7)
    assert plan.depth == len(result.model.layers) == result.config.num_hidden_layers <= 4
    plan.save(tmp_path / "plan.json")
    read = CollapsePlan.load(tmp_path / "plan.json")
    assert read == plan
    again = apply_plan(copy.deepcopy(model), read)
    assert_same_weights(again, result)
    assert again.config.to_dict() == result.config.to_dict()
    assert plan.parameters.after == sum(p.numel() for p in result.parameters())
    samples = token_ids(tiny_tokenizer, TEXTS)
    assert plan.calibration is not None
    assert plan.calibration.loss_before == pytest.approx(oracle.loss(model, samples), abs=1e-5)
    assert plan.calibration.loss_after == pytest.approx(oracle.loss(result, samples), abs=1e-5)


@pytest.mark.parametrize(
    ("strategy", "criterion"),
    [("greedy", "loss"), *((s, "similarity") for s in STRATEGIES if s != "streamline")],
)
def test_streamed_weights_give_the_same_plan(
    tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase, strategy: str, criterion: str
) -> None:
    model = scramble(tiny_llama(layers=8), seed=3)
    values = {"layers_per_merge": 3, "target_depth": 4, "criterion": criterion}
    there, here = (
        searched(model, tiny_tokenizer, strategy, placement=placement, **values)[1]
        for placement in ("stream", "device")
    )
    assert (there.merges, there.removed, there.calibration) == (here.merges, here.removed, here.calibration)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ratio_asks_for_the_same_depth(
    tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase, strategy: str
) -> None:
    model = scramble(tiny_llama(layers=7), seed=4)
    layer = sum(p.numel() for p in model.model.layers[0].parameters())
    ratio = 2.3 * layer / sum(p.numel() for p in model.parameters())
    by_ratio = searched(model, tiny_tokenizer, strategy, layers_per_merge=2, target_ratio=ratio)[1]
    by_depth = searched(model, tiny_tokenizer, strategy, layers_per_merge=2, target_depth=5)[1]
    assert by_ratio.lineage == by_depth.lineage


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != "tail"])
def test_each_candidate_is_reported(tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase, strategy: str) -> None:
    seen: list[Any] = []
    wanted = CollapseSettings(strategy=strategy, layers_per_merge=2, target_depth=5, calibration=TEXTS)  # type: ignore[arg-type]
    _, plan = collapse_model(scramble(tiny_llama(layers=6), 5), tiny_tokenizer, wanted, on_candidate=seen.append)
    assert seen[-len(plan.candidates) :] == list(plan.candidates)
    assert all(c.seconds >= 0 for c in seen)


def test_none_keeps_everything(tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    model = scramble(tiny_llama(layers=5), seed=6)
    result, plan = searched(model, tiny_tokenizer, "none")
    assert_same_weights(result, model)
    assert result.config.to_dict() == model.config.to_dict()
    assert (plan.strategy, plan.depth, plan.merges, plan.removed, plan.candidates) == ("none", 5, (), (), ())
    assert plan.lineage == tuple((i,) for i in range(5))
    assert_same_weights(apply_plan(copy.deepcopy(model), CollapsePlan.from_dict(plan.to_dict())), model)


BAD: list[tuple[dict[str, Any], str]] = [
    *(({"strategy": rival}, "collapse.strategy") for rival in RIVALS),
    ({"strategy": "none", "target_depth": 3}, "collapse.strategy"),
    ({"strategy": "none", "target_ratio": 0.2}, "collapse.strategy"),
    ({"strategy": "sleb", "plan": "plan.json"}, "collapse.strategy"),
    ({"strategy": "none", "remove": [1]}, "collapse.strategy"),
    ({"criterion": "loss", "target_depth": 3}, "collapse.criterion"),
    ({"strategy": "greedy", "criterion": "loss"}, "collapse.criterion"),
    ({"strategy": "greedy", "criterion": "loss", "similarity_threshold": 0.5}, "collapse.criterion"),
    ({"strategy": "sleb", "target_depth": 3, "similarity_threshold": 0.5}, "collapse.target_depth"),
    ({"strategy": "sleb", "target_depth": 3, "calibration": ["a"]}, "collapse.calibration"),
]


@pytest.mark.parametrize(("bad", "key"), BAD, ids=str)
def test_contradictions_name_their_key(
    tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase, bad: dict[str, Any], key: str
) -> None:
    model = scramble(tiny_llama(layers=5), seed=7)
    before = copy.deepcopy(model)
    with pytest.raises(InputError) as error:
        collapse_model(model, tiny_tokenizer, CollapseSettings(**{"calibration": TEXTS, "layers_per_merge": 2, **bad}))
    assert error.value.key == key
    assert "\n" not in str(error.value)
    assert_same_weights(model, before)


def test_letters_of_algorithm_1_mean_nothing_to_rivals(
    tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    """A four-layer model is too shallow for the default C, but not for a rival."""
    model = scramble(tiny_llama(layers=4), seed=8)
    for strategy in RIVALS:
        assert searched(model, tiny_tokenizer, strategy, target_depth=2)[1].depth == 2


def test_sleb_computes_only_what_lies_behind_a_change(
    tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Layer k runs in the trials that begin before it, and not again in front of what went."""
    model = scramble(tiny_llama(layers=6), seed=9)
    calls = [0] * 6
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    wanted = CollapseSettings(strategy="sleb", target_depth=5, calibration=TEXTS)
    _, plan = collapse_model(model, tiny_tokenizer, wanted)
    assert len(plan.candidates) == 6
    gone = plan.removed[0]
    # the calibration pass, the trials, and once more behind the layer that went; the last layer runs twice more by
    # hand, when the states are first recorded and when those that leave it are asked for
    assert calls == [1 + k + (k > gone) + 2 * (k == 5) for k in range(6)]
