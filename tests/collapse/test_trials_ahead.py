"""Trials that are made ahead of the decision and share layer calls, as on a GPU, decide as one at a time."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from laco_train.collapse import CollapsePlan, collapse_model
from laco_train.collapse.walk import Walk
from laco_train.settings import CollapseSettings
from tests.collapse.helpers import TEXTS, assert_same_weights, scramble
from tests.collapse.tiny import tiny

Llama = Callable[..., LlamaForCausalLM]


@contextmanager
def shared(ahead: int, at_once: int) -> Iterator[None]:
    """For the time of the block a walk makes `ahead` trials before the first decision, `at_once` in a layer call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Walk, "trials_ahead", ahead)
        patch.setattr(Walk, "trials_at_once", at_once)
        yield


def assert_same(a: CollapsePlan, b: CollapsePlan) -> None:
    """Same candidates and decisions in the same order, similarities and scores to rounding."""
    assert [(c.layer, c.absorbed, c.accepted) for c in a.candidates] == [
        (c.layer, c.absorbed, c.accepted) for c in b.candidates
    ]
    for name in ("similarity", "score"):
        mine, theirs = ([getattr(c, name) for c in plan.candidates] for plan in (a, b))
        assert mine == pytest.approx(theirs, abs=1e-6)
    assert (a.merges != ()) == (b.merges != ())
    assert a.lineage == b.lineage


def one_and_many(
    model: Any, tokenizer: PreTrainedTokenizerBase, wanted: CollapseSettings, ahead: int, at_once: int
) -> tuple[CollapsePlan, CollapsePlan]:
    """The plan one trial at a time, and the plan with many; models that come out differ in no bit."""
    models = [copy.deepcopy(model) for _ in range(2)]
    _, alone = collapse_model(models[0], tokenizer, wanted)
    with shared(ahead, at_once):
        _, many = collapse_model(models[1], tokenizer, wanted)
    assert_same(many, alone)
    assert_same_weights(*models)
    return alone, many


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_laco(tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase, data: st.DataObject) -> None:
    C, depth = data.draw(st.integers(2, 4)), data.draw(st.integers(6, 10))
    wanted = CollapseSettings(
        layers_per_merge=C,
        lowest_layer=data.draw(st.integers(1, depth - C)),
        min_interval=data.draw(st.integers(1, 3)),
        similarity_threshold=data.draw(st.floats(-0.2, 0.9)),
        merge_rule=data.draw(st.sampled_from(["rdsc", "drop"])),
        calibration=data.draw(st.sampled_from([TEXTS, TEXTS[:1]])),
    )
    ahead, at_once = data.draw(st.integers(2, 9)), data.draw(st.integers(1, 5))
    seed = data.draw(st.integers(0, 999))
    model = scramble(tiny_llama(layers=depth), seed)
    _, plan = collapse_model(copy.deepcopy(model), tiny_tokenizer, wanted)
    threshold = wanted.similarity_threshold
    assert threshold is not None
    assume(all(c.similarity is not None and abs(c.similarity - threshold) > 1e-5 for c in plan.candidates))
    one_and_many(model, tiny_tokenizer, wanted, ahead, at_once)


@pytest.mark.parametrize("C", [2, 3, 4])
@pytest.mark.parametrize("rule", ["rdsc", "drop"])
@pytest.mark.parametrize(("ahead", "at_once"), [(8, 1), (8, 3), (3, 8)])
def test_laco_with_acceptances(
    tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase, C: int, rule: Any, ahead: int, at_once: int
) -> None:
    """At a threshold that the first candidates fail and one after them passes: work ahead of it is thrown away."""
    model = scramble(tiny_llama(layers=10), seed=9 if (C, rule) == (4, "rdsc") else 11)
    rejecting = CollapseSettings(
        layers_per_merge=C, min_interval=1, similarity_threshold=1.0, calibration=TEXTS, merge_rule=rule
    )
    _, plan = collapse_model(copy.deepcopy(model), tiny_tokenizer, rejecting)
    similarities = [c.similarity for c in plan.candidates if c.similarity is not None]
    record = next(i for i in range(1, 10) if similarities[i] > max(similarities[:i]))
    threshold = (max(similarities[:record]) + similarities[record]) / 2
    alone, _ = one_and_many(model, tiny_tokenizer, replace(rejecting, similarity_threshold=threshold), ahead, at_once)
    assert [c.accepted for c in alone.candidates][: record + 1] == [False] * record + [True]


@pytest.mark.parametrize(
    "wanted", [{"strategy": "greedy"}, {"strategy": "greedy", "criterion": "loss"}, {"strategy": "sleb"}, {}], ids=str
)
def test_every_search(tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase, wanted: dict[str, Any]) -> None:
    model = scramble(tiny_llama(layers=8), seed=6)
    values = {"layers_per_merge": 3, "merge_rule": "mean", "target_depth": 4, "calibration": TEXTS, **wanted}
    one_and_many(model, tiny_tokenizer, CollapseSettings(**values), 8, 3)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "smollm3", "gpt2", "opt", "falcon", "gpt_oss"])
def test_masks_and_positions_of_other_families(tiny_tokenizer: PreTrainedTokenizerBase, kind: str) -> None:
    """What a family passes to its layers differs by layer, and only some of it grows with the batch."""
    rule: Any = "drop" if kind == "gpt_oss" else "rdsc"
    wanted = CollapseSettings(
        layers_per_merge=2, min_interval=1, merge_rule=rule, mixed_types="first", target_depth=4, calibration=TEXTS
    )
    one_and_many(tiny(kind), tiny_tokenizer, wanted, 8, 3)
