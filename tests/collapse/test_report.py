"""What a user reads about a collapse: asked and reached depth, what it cost, and what to try if nothing went."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from laco_train.collapse import CollapsePlan, collapse_model
from laco_train.collapse.plan import Calibration, Candidate
from laco_train.collapse.report import describe, similarity_figure
from laco_train.collapse.strategies import STRATEGIES
from laco_train.settings import CollapseSettings
from tests.collapse.helpers import TEXTS, scramble

Llama = Callable[..., LlamaForCausalLM]


@pytest.fixture(scope="module")
def eight(tiny_llama: Llama) -> LlamaForCausalLM:
    """Eight layers; tests work on copies."""
    return scramble(tiny_llama(layers=8), seed=1)


def planned(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, **values: Any) -> CollapsePlan:
    """The plan for a copy of `model`."""
    return collapse_model(copy.deepcopy(model), tokenizer, CollapseSettings(calibration=TEXTS, **values))[1]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_names_asked_and_reached_depth(
    eight: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase, strategy: str
) -> None:
    plan = planned(eight, tiny_tokenizer, strategy=strategy, layers_per_merge=3, min_interval=1, target_depth=5)
    text = "\n".join(describe(plan))
    assert f"asked for at most 5 layers, reached {plan.depth} by {strategy}" in text
    assert (" at T = " in text) == (strategy == "laco")
    assert plan.calibration is not None
    assert f"calibration loss {plan.calibration.loss_before:.3f} nats per token before" in text
    similarity_figure(plan).canvas.draw()


def test_asked_by_ratio(eight: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    layer = sum(p.numel() for p in eight.model.layers[0].parameters())
    ratio = 2.4 * layer / sum(p.numel() for p in eight.parameters())
    plan = planned(eight, tiny_tokenizer, layers_per_merge=4, min_interval=1, target_ratio=ratio)
    assert plan.depth == 5  # a merge takes three away
    assert any("asked for at most 6 layers, reached 5 by laco" in line for line in describe(plan))


def test_nothing_accepted_says_what_would_be_at_which_threshold(
    eight: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    """Each threshold that it names is right: just above it another merge is the first, just below it is that one."""
    values: dict[str, Any] = {"layers_per_merge": 2, "min_interval": 1}
    plan = planned(eight, tiny_tokenizer, similarity_threshold=1.0, **values)
    order = [c.similarity for c in plan.candidates]
    shuffled = [0.2, 0.5, 0.1, 0.7, 0.6, 0.9, 0.3]
    candidates = tuple(
        dataclasses.replace(c, similarity=s) for c, s in zip(plan.candidates, shuffled[: len(order)], strict=True)
    )
    lines = [line.strip() for line in describe(dataclasses.replace(plan, candidates=candidates))]
    layers = [c.layer for c in candidates]
    assert "the best had similarity 0.9000" in "\n".join(lines)
    assert [line for line in lines if line.startswith("below T")] == [
        f"below T = 0.9000 layers {layers[5]} to {layers[5] + 1} would merge first",
        f"below T = 0.7000 layers {layers[3]} to {layers[3] + 1} would merge first",
        f"below T = 0.5000 layers {layers[1]} to {layers[1] + 1} would merge first",
    ]
    best = max(plan.candidates, key=lambda c: c.similarity or -1)
    assert best.similarity is not None
    accepting = planned(eight, tiny_tokenizer, similarity_threshold=best.similarity - 1e-6, **values)
    assert accepting.merges[0].layer == best.layer


def test_greedy_that_accepts_nothing_names_its_best_window(
    eight: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    plan = planned(eight, tiny_tokenizer, strategy="greedy", layers_per_merge=3, similarity_threshold=1.0)
    best = max(plan.candidates, key=lambda c: c.similarity or -1)
    assert best.similarity is not None
    told = [line.strip() for line in describe(plan) if "would merge first" in line]
    last = best.layer + best.absorbed
    assert told == [f"below T = {best.similarity:.4f} layers {best.layer} to {last} would merge first"]


def with_outcome(plan: CollapsePlan, similarity: float, before: float | None, after: float | None) -> CollapsePlan:
    """`plan` with every similarity and the calibration losses replaced."""

    def like(c: Candidate) -> Candidate:
        return dataclasses.replace(c, similarity=similarity if c.accepted else c.similarity)

    merges = tuple(dataclasses.replace(m, similarity=similarity) for m in plan.merges)
    calibration = Calibration(1, 10, "", before, after)
    candidates = tuple(map(like, plan.candidates))
    return dataclasses.replace(plan, merges=merges, candidates=candidates, calibration=calibration)


@pytest.mark.parametrize(
    ("values", "similarity", "after", "warns"),
    [
        ({"similarity_threshold": -1.0}, 0.7, 5.1, True),
        ({"similarity_threshold": -1.0}, 0.7, 4.9, False),
        ({"target_depth": 6}, 0.95, 5.1, True),
        ({"target_depth": 6}, 0.95, 4.9, False),
        ({"target_depth": 6}, 0.7, 9.0, False),
        ({"similarity_threshold": -1.0}, 0.7, None, False),
    ],
)
def test_high_similarity_and_exploded_loss(
    eight: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerBase,
    values: dict[str, Any],
    similarity: float,
    after: float | None,
    warns: bool,
) -> None:
    plan = planned(eight, tiny_tokenizer, layers_per_merge=2, **values)
    lines = describe(with_outcome(plan, similarity, 3.0, after))
    warnings = [line for line in lines if "warning" in line]
    assert bool(warnings) == warns
    if warns:
        assert f"{similarity:.4f}" in warnings[0]
        assert "rose by 2.10 nats" in warnings[0]
        assert any("3.000 nats per token before, 5.100 after" in line for line in lines)


def test_none_is_plain(eight: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    lines = describe(planned(eight, tiny_tokenizer, strategy="none"))
    assert lines == [f"Kept all 8 layers ({sum(p.numel() for p in eight.parameters()):,} parameters)"]
