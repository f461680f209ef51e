"""Plans of several rounds joined into one: what they say about the first model's layers, and what they refuse."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from laco_train.collapse import CollapsePlan, apply_plan
from laco_train.collapse.composition import compose, from_the_first_model, plan_of_source, rounds_of
from laco_train.collapse.plan import Merge, Parameters, Refined
from laco_train.errors import InputError

Layers = list[list[int]]


def gone_through(plan: CollapsePlan, layers: Layers) -> Layers:
    """What a plain plan leaves of `layers`, each a list of labels: one merge after the other on a list."""
    left = [(index, list(layer)) for index, layer in enumerate(layers)]
    for merge in plan.merges:
        absorbed = [left.pop(merge.layer + 1) for _ in range(merge.absorbed)]
        if plan.merge_rule != "drop":
            for _, layer in absorbed:
                left[merge.layer][1].extend(layer)
    return [layer for index, layer in left if index not in plan.removed]


def flat(layers: Layers) -> list[int]:
    return [index for layer in layers for index in layer]


@st.composite
def plans(draw: st.DrawFn, depth: int) -> CollapsePlan:
    """A plain plan for `depth` layers: merges, layers dropped by merges, layers removed by name, or a fitted one."""
    rule = draw(st.sampled_from(["rdsc", "mean", "drop", "fitted"]))
    left, merges = depth, []
    for _ in range(draw(st.integers(0, 2))):
        if left < 2:
            break
        layer = draw(st.integers(0, left - 2))
        absorbed = draw(st.integers(1, min(3, left - 1 - layer)))
        merges.append(Merge(layer, absorbed, draw(st.floats(-1, 1))))
        left -= absorbed
    named: frozenset[int] = frozenset()
    if rule == "drop" and not merges:
        named = draw(st.frozensets(st.integers(0, depth - 1), max_size=depth - 1))
    layers: Layers = [[index] for index in range(depth)]
    for merge in merges:
        window = layers[merge.layer : merge.layer + merge.absorbed + 1]
        layers[merge.layer : merge.layer + merge.absorbed + 1] = [window[0] if rule == "drop" else flat(window)]
    layers = [layer for layer in layers if layer[0] not in named]
    held = flat(layers)
    before = draw(st.integers(100, 10**6))
    return CollapsePlan(
        source=draw(st.text(max_size=5)),
        source_fingerprint=draw(st.text(max_size=5)),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        strategy="remove" if named else "streamline" if rule == "fitted" else "laco",
        round=0,
        source_depth=depth,
        depth=len(layers),
        settings={"similarity_threshold": None, "seed": draw(st.integers(0, 9))},
        merge_rule=rule,
        merge_norms=draw(st.booleans()),
        merges=tuple(merges),
        removed=tuple(index for index in range(depth) if index not in held),
        candidates=(),
        lineage=tuple(map(tuple, layers)),
        parameters=Parameters(before, before - 1, 1 / before),
        calibration=None,
        refined=Refined.of(b"weights", 10, 1.0) if rule == "fitted" else None,
    )


@st.composite
def chains(draw: st.DrawFn, length: int) -> list[CollapsePlan]:
    """Plans, each for the depth that the one before left."""
    found = [draw(plans(draw(st.integers(1, 14))))]
    while len(found) < length:
        found.append(draw(plans(found[-1].depth)))
    return found


TOKENS = st.none() | st.integers(0, 10**9)


@settings(max_examples=100, deadline=None)
@given(chain=chains(2), trained=TOKENS)
def test_layers_are_those_of_the_first_model(chain: list[CollapsePlan], trained: int | None) -> None:
    first, second = chain
    whole = compose(first, second, trained)
    layers = [[index] for index in range(first.source_depth)]
    assert [list(layer) for layer in whole.lineage] == gone_through(second, gone_through(first, layers))
    assert (whole.source, whole.source_fingerprint, whole.dtype) == (
        first.source,
        first.source_fingerprint,
        first.dtype,
    )
    assert (whole.source_depth, whole.depth, whole.round) == (first.source_depth, second.depth, 1)
    assert (whole.parameters.before, whole.parameters.after) == (first.parameters.before, second.parameters.after)
    assert [one.trained for one in whole.rounds] == [0, trained]
    assert [one.merges for one in whole.rounds] == [first.merges, second.merges]


@settings(max_examples=100, deadline=None)
@given(chain=chains(3))
def test_lineage_is_a_partition_of_what_is_kept_in_order(chain: list[CollapsePlan]) -> None:
    whole = compose(compose(chain[0], chain[1], 1), chain[2], 1)
    held = [index for layer in whole.lineage for index in layer]
    assert held == sorted(set(held))
    assert sorted([*held, *whole.removed]) == list(range(whole.source_depth))
    assert len(whole.lineage) == whole.depth
    # a layer that a round drops is gone, with all that was merged into it
    assert set(chain[0].removed) <= set(whole.removed)
    for index in chain[1].removed:
        assert set(chain[0].lineage[index]) <= set(whole.removed)


@settings(max_examples=100, deadline=None)
@given(chain=chains(3), tokens=st.tuples(TOKENS, TOKENS))
def test_composition_is_associative(chain: list[CollapsePlan], tokens: tuple[int | None, int | None]) -> None:
    a, b, c = chain
    left = compose(compose(a, b, tokens[0]), c, tokens[1])
    assert left == compose(a, compose(b, c, tokens[1]), tokens[0])
    assert [one.trained for one in left.rounds] == [0, *tokens]
    assert rounds_of(left) == (*rounds_of(compose(a, b, tokens[0])), left.rounds[2])


@settings(max_examples=50, deadline=None)
@given(chain=chains(2))
def test_file_round_trip(chain: list[CollapsePlan], tmp_path_factory: pytest.TempPathFactory) -> None:
    whole = compose(chain[0], chain[1], 7)
    path = tmp_path_factory.mktemp("plan") / "collapse_plan.json"
    whole.save(path)
    assert CollapsePlan.load(path) == whole
    assert [file.name for file in path.parent.iterdir()] == [path.name]  # no weights: they would be of one round


def removing(plan: CollapsePlan, layer: int) -> CollapsePlan:
    """A plan of the three layers that `plan` leaves: one is removed."""
    lineage = tuple((index,) for index in range(3) if index != layer)
    return dataclasses.replace(
        plan,
        strategy="remove",
        source_depth=3,
        depth=2,
        merge_rule="drop",
        merges=(),
        removed=(layer,),
        candidates=(),
        lineage=lineage,
    )


def twice(plan: CollapsePlan) -> CollapsePlan:
    return compose(plan, removing(plan, 1), 640)


def test_plans_of_other_depths_do_not_compose(plan: CollapsePlan) -> None:
    with pytest.raises(ValueError, match="leaves 3 layers and one of 9"):
        compose(plan, plan, 1)


def test_it_cannot_be_applied(plan: CollapsePlan, nine: LlamaForCausalLM) -> None:
    model = copy.deepcopy(nine)
    for follow in (False, True):
        with pytest.raises(InputError, match=r"collapse\.plan: is composed of 2 rounds with training between") as error:
            apply_plan(model, twice(plan), weights_follow=follow)
        assert "\n" not in str(error.value)
    assert len(model.model.layers) == 9


def changed(values: dict[str, Any], name: str) -> dict[str, Any]:
    """A composed plan's JSON with one thing wrong."""
    wrong: dict[str, Any] = json.loads(json.dumps(values))
    if name == "lineage":
        wrong["lineage"][0], wrong["removed"] = [0, 1], [2, 3, 4, 5, 6, 7]
    elif name == "one round":
        wrong["rounds"] = wrong["rounds"][:1]
    elif name == "a rule of one round":
        wrong["merge_rule"] = "rdsc"
    elif name == "merges of its own":
        wrong["merges"] = wrong["rounds"][0]["merges"]
    elif name == "number":
        wrong["round"] = 2
    elif name == "depth of a round":
        wrong["rounds"][1]["source_depth"] = 4
    return wrong


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lineage", "lineage does not follow"),
        ("one round", "two rounds or more"),
        ("a rule of one round", "two rounds or more"),
        ("merges of its own", "two rounds or more"),
        ("number", "round is 2"),
        ("depth of a round", "is of 4 layers"),
    ],
)
def test_inconsistent_file_is_refused(plan: CollapsePlan, name: str, words: str) -> None:
    values = json.loads(json.dumps(twice(plan).to_dict()))
    CollapsePlan.from_dict(values)
    with pytest.raises(InputError, match=words):
        CollapsePlan.from_dict(changed(values, name))


def test_a_source_without_a_plan_is_the_first_model(plan: CollapsePlan, tmp_path: Path) -> None:
    assert from_the_first_model(plan, str(tmp_path)) is plan
    assert from_the_first_model(plan, "a-hub/id") is plan


@pytest.mark.parametrize(
    ("summary", "trained"),
    [
        (None, None),
        ({"tokens": 512}, 512),
        ({"tokens": 900, "rounds": [{"tokens": 500}, {"tokens": 400}]}, 400),
        ({"nothing": 1}, None),
    ],
)
def test_a_source_that_a_run_exported(
    plan: CollapsePlan, tmp_path: Path, summary: dict[str, Any] | None, trained: int | None
) -> None:
    (tmp_path / "export").mkdir()
    plan.save(tmp_path / "export" / "collapse_plan.json")
    if summary is not None:
        (tmp_path / "summary.json").write_text(json.dumps(summary))
    whole = from_the_first_model(removing(plan, 0), str(tmp_path / "export"))
    assert whole.lineage == ((1, 2, 3, 4, 5, 6, 7), (8,))
    assert [one.trained for one in whole.rounds] == [0, trained]


def test_a_source_whose_plan_is_not_its_own(plan: CollapsePlan, tmp_path: Path) -> None:
    plan.save(tmp_path / "collapse_plan.json")
    assert plan_of_source(str(tmp_path), 3) == plan
    with pytest.raises(InputError, match="leaves 3 layers, but the model has 5"):
        plan_of_source(str(tmp_path), 5)
