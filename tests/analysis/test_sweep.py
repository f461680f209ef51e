"""The sweep against one search a setting, and the rule by which it recommends."""

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from laco_train.analysis.settings import SweepSettings, check_sweep
from laco_train.analysis.sweep import Outcome, best_at_each_depth, recommend, run_sweep, sweep_grid
from laco_train.collapse import collapse_model
from laco_train.collapse.decoder import decoder_of
from laco_train.collapse.similarity import calibration_batch
from laco_train.collapse.walk import Walk
from laco_train.errors import InputError
from laco_train.settings import CollapseSettings
from tests.collapse.helpers import TEXTS, scramble
from tests.collapse.tiny import tiny

BASE = CollapseSettings(layers_per_merge=3, target_depth=4, calibration=TEXTS)


def test_outcomes_are_those_of_one_collapse_each(
    tiny_llama: Callable[..., LlamaForCausalLM], tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    model = scramble(tiny_llama(layers=7), seed=5)
    batch = calibration_batch(tiny_tokenizer, TEXTS)
    sweep = SweepSettings(
        layers_per_merge=[2, 3], lowest_layer=[1, 3], min_interval=[1, 2], similarity_thresholds=[0.2, 0.6]
    )
    grid = sweep_grid(sweep, BASE, 7)
    assert len(grid) == 16
    steps: list[float] = []
    outcomes = run_sweep(Walk(decoder_of(model), batch, BASE), grid, steps.append)
    assert steps == sorted(steps)
    assert steps[-1] == 16
    depths = set()
    for settings, outcome in zip(grid, outcomes, strict=True):
        collapsed, plan = collapse_model(copy.deepcopy(model), tiny_tokenizer, settings)
        labels = batch.input_ids.masked_fill(batch.mask == 0, -100)
        with torch.no_grad():
            loss = collapsed(input_ids=batch.input_ids, attention_mask=batch.mask, labels=labels, use_cache=False).loss
        assert outcome.depth == plan.depth
        assert outcome.loss == pytest.approx(loss.item(), abs=1e-4)
        assert outcome.similarity == pytest.approx(plan.merges[-1].similarity if plan.merges else 1.0, abs=1e-5)
        assert (outcome.layers_per_merge, outcome.lowest_layer) == (settings.layers_per_merge, settings.lowest_layer)
        assert (outcome.min_interval, outcome.similarity_threshold) == (
            settings.min_interval,
            settings.similarity_threshold,
        )
        depths.add(plan.depth)
    assert len(depths) > 2  # else the sweep says nothing


def test_windows_of_unlike_layers_are_not_accepted(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """Every fourth layer of SmolLM3 has no RoPE, so that each window of four mixes types."""
    model = tiny("smollm3", num_hidden_layers=7)
    sweep = SweepSettings(layers_per_merge=[2, 3, 4], similarity_thresholds=[-1.0])
    walk = Walk(decoder_of(model), calibration_batch(tiny_tokenizer, TEXTS), BASE)
    depths = {each.layers_per_merge: each.depth for each in run_sweep(walk, sweep_grid(sweep, BASE, 7))}
    assert depths[2] < 7 and depths[3] < 7
    assert depths[4] == 7


def test_windows_that_all_are_of_unlike_layers_are_told(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny("smollm3", num_hidden_layers=7)
    walk = Walk(decoder_of(model), calibration_batch(tiny_tokenizer, TEXTS), BASE)
    grid = sweep_grid(SweepSettings(layers_per_merge=[4, 5]), BASE, 7)
    with pytest.raises(InputError, match=r"^collapse\.mixed_types: every window of 4 or 5 layers mixes layer types"):
        run_sweep(walk, grid)


def test_grid_leaves_out_what_does_not_fit_and_what_contradicts_a_threshold() -> None:
    grid = sweep_grid(SweepSettings(enabled=True), dataclasses.replace(BASE, lowest_layer=3), 6)
    assert {(s.layers_per_merge, s.highest_layer, s.target_depth) for s in grid} == {(2, 6, None), (3, 6, None)}
    assert [s.similarity_threshold for s in grid[:7]] == [0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5]


@pytest.mark.parametrize(
    ("sweep", "key"),
    [
        (SweepSettings(layers_per_merge=[1, 2]), "sweep.layers_per_merge"),
        (SweepSettings(layers_per_merge=[7]), "sweep.layers_per_merge"),
        (SweepSettings(layers_per_merge=[]), "sweep.layers_per_merge"),
        (SweepSettings(lowest_layer=[0]), "sweep.lowest_layer"),
        (SweepSettings(highest_layer=[7]), "sweep.highest_layer"),
        (SweepSettings(min_interval=[0]), "sweep.min_interval"),
        (SweepSettings(similarity_thresholds=[0.5, 1.5]), "sweep.similarity_thresholds"),
        (SweepSettings(max_loss_increase=-1.0), "sweep.max_loss_increase"),
        (SweepSettings(layers_per_merge=[6], lowest_layer=[2]), "sweep.layers_per_merge"),
    ],
)
def test_bad_values_name_their_key(sweep: SweepSettings, key: str) -> None:
    with pytest.raises(InputError) as caught:
        sweep_grid(sweep, BASE, 6)
    assert caught.value.key == key


def test_a_list_implies_the_sweep() -> None:
    assert not SweepSettings().requested
    assert SweepSettings(enabled=True).requested
    assert SweepSettings(min_interval=[1]).requested
    check_sweep(SweepSettings(similarity_thresholds=[-1.0, 1.0]))


def outcome(depth: int, loss: float, threshold: float = 0.5, c: int = 3) -> Outcome:
    return Outcome(c, 1, 9, 2, threshold, depth, 0.9, loss)


def pick(outcomes: list[Outcome], base: CollapseSettings = BASE) -> tuple[Outcome | None, tuple[str, ...]]:
    found = recommend(outcomes, base, source_depth=9, original_loss=2.0, allowed=1.0)
    return found.outcome, found.options


def test_best_at_each_depth_has_the_least_finite_loss() -> None:
    first, tied, worse, other = outcome(7, 2.5, 0.7), outcome(7, 2.5, 0.6), outcome(7, 2.6), outcome(8, 2.1)
    assert best_at_each_depth([worse, first, tied, other, outcome(6, float("nan"))]) == [other, first]


def test_recommends_the_fewest_layers_within_the_allowance() -> None:
    within, too_dear = outcome(6, 3.0), outcome(4, 3.1)
    assert pick([outcome(9, 2.0), outcome(8, 2.1), within, outcome(6, 3.2), too_dear])[0] == within
    cheapest = outcome(5, 5.9)  # 0.975 nats a layer
    assert pick([outcome(9, 2.0), outcome(8, 3.1), cheapest, outcome(3, 8.0)])[0] == cheapest
    assert pick([outcome(9, 2.0)]) == (None, ())


def test_options_are_what_differs_from_the_recipe() -> None:
    assert pick([outcome(6, 2.5, 0.0)])[1] == ("--collapse.similarity_threshold 0.0", "--collapse.target_depth null")
    base = CollapseSettings(layers_per_merge=2, similarity_threshold=0.5, strategy="greedy", lowest_layer=2)
    assert pick([outcome(6, 2.5)], base)[1] == (
        "--collapse.layers_per_merge 3",
        "--collapse.lowest_layer 1",
        "--collapse.strategy laco",
    )
