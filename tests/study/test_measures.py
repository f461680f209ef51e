"""Measures against an independent slow version, and what must hold for any curves."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from laco_train.study.curves import Arm, Point, Run, Segment
from laco_train.study.measures import (
    NEAR,
    arm_loss,
    inheritance,
    loss_at,
    mean_curve,
    measure,
    recovered,
    spread,
    tokens_to,
)

LOSSES = st.floats(0.5, 12)
CURVES = st.lists(st.tuples(st.integers(1, 10**7), LOSSES), min_size=1, max_size=12, unique_by=lambda p: p[0]).map(
    lambda found: [(0, 9.0), *sorted(found)]
)


def points(pairs: list[tuple[int, float]]) -> list[Point]:
    return [Point(*pair) for pair in pairs]


def arm_of(*curves: list[tuple[int, float]], name: str = "arm", depth: int = 4) -> Arm:
    runs = [run_of(Segment(depth, tuple(points(curve))), seed=seed, name=name) for seed, curve in enumerate(curves)]
    return Arm(name, tuple(runs))


def run_of(*segments: Segment, seed: int = 0, name: str = "arm") -> Run:
    return Run(
        folder=Path(f"{name}-seed{seed}"),
        name=name,
        group=name,
        seed=seed,
        strategy="laco",
        from_scratch=name == "scratch",
        source_depth=6,
        depth=segments[-1].depth,
        parameters=400,
        source_parameters=600,
        segments=segments,
        original=None,
        validation_sha256=None,
        train_sha256=None,
        learning_rate=None,
        training_speed=None,
        export=None,
    )


def slow_loss_at(pairs: list[tuple[int, float]], tokens: float) -> float | None:
    """The same, by numpy over log tokens."""
    by_distance = sorted(pairs, key=lambda pair: abs(pair[0] - tokens))
    if abs(by_distance[0][0] - tokens) <= 0.02 * tokens:
        return by_distance[0][1]
    trained = pairs[1:]
    if not trained[0][0] <= tokens <= trained[-1][0]:
        return None
    return float(np.interp(math.log(tokens), [math.log(t) for t, _ in trained], [loss for _, loss in trained]))


def slow_tokens_to(pairs: list[tuple[int, float]], loss: float) -> float | None:
    """The same, by bisection of the curve that `slow_loss_at` draws between two evaluations."""
    first = next((index for index, pair in enumerate(pairs) if pair[1] <= loss), None)
    if first is None or first == 0 or pairs[first - 1][0] == 0:
        return None if first is None else float(pairs[first][0])
    low, high = math.log(pairs[first - 1][0]), math.log(pairs[first][0])
    ends, values = [low, high], [pairs[first - 1][1], pairs[first][1]]
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if np.interp(middle, ends, values) <= loss else (middle, high)
    return math.exp(high)


@given(CURVES, st.floats(0, 1.2e7))
def test_loss_at_equals_the_slow_version(pairs: list[tuple[int, float]], tokens: float) -> None:
    distances = sorted(abs(t - tokens) for t, _ in pairs)
    assume(len(distances) < 2 or distances[0] != distances[1])  # a tie, of which the later evaluation counts
    found = loss_at(points(pairs), tokens)
    assert (None if found is None else found.loss) == pytest.approx(slow_loss_at(pairs, tokens))


@given(CURVES, st.floats(0.5, 13))
def test_tokens_to_equals_the_slow_version(pairs: list[tuple[int, float]], loss: float) -> None:
    found = tokens_to(points(pairs), loss)
    assert (None if found is None else found.tokens) == pytest.approx(slow_tokens_to(pairs, loss))


@given(CURVES)
def test_an_evaluation_is_read_and_not_interpolated(pairs: list[tuple[int, float]]) -> None:
    for tokens, loss in pairs:
        found = loss_at(points(pairs), tokens)
        assert found is not None
        assert (found.loss, found.interpolated) == (loss, False)


def test_interpolation_is_marked_and_linear_in_log_tokens() -> None:
    curve = points([(0, 9.0), (100, 5.0), (10_000, 3.0)])
    between = loss_at(curve, 1000)
    assert between is not None
    assert (between.loss, between.interpolated) == (pytest.approx(4.0), True)
    near = loss_at(curve, 100 * (1 + NEAR / 2))
    assert near is not None
    assert (near.loss, near.interpolated) == (5.0, False)
    assert loss_at(curve, 50) is None  # between 0 tokens and the first evaluation
    assert loss_at(curve, 30, step=100) is None  # nearest to the loss before training, which is none after it
    step = loss_at(curve, 60, step=100)
    assert step is not None and (step.loss, step.interpolated) == (5.0, False)
    assert loss_at(curve, 20_000) is None


def test_at_a_collapse_the_loss_after_it_counts() -> None:
    curve = points([(0, 9.0), (100, 3.0), (100, 6.0), (200, 4.0)])
    found = loss_at(curve, 100)
    assert found is not None and found.loss == 6.0
    later = loss_at(curve, 140)
    assert later is not None and 4.0 < later.loss < 6.0


def test_how_a_loss_is_reached_is_told() -> None:
    curve = points([(0, 9.0), (100, 5.0), (10_000, 3.0)])
    assert [(r.tokens, r.how) for r in (tokens_to(curve, 9.0), tokens_to(curve, 5.0)) if r] == [
        (0, "exact"),
        (100, "exact"),
    ]
    early, middle = tokens_to(curve, 6.0), tokens_to(curve, 4.0)
    assert early is not None and (early.tokens, early.how) == (100, "at most")
    assert middle is not None and (middle.tokens, middle.how) == (pytest.approx(1000), "interpolated")
    assert tokens_to(curve, 2.0) is None


@given(LOSSES, LOSSES, LOSSES)
def test_inheritance_of_scratch_is_0_and_of_the_original_1(arm: float, scratch: float, original: float) -> None:
    if scratch <= original:
        assert inheritance(arm, scratch, original) is None
        return
    assert inheritance(scratch, scratch, original) == 0
    assert inheritance(original, scratch, original) == 1
    share = inheritance(arm, scratch, original)
    assert share is not None
    assert scratch - share * (scratch - original) == pytest.approx(arm)


@given(LOSSES, st.floats(0.2, 5), st.floats(-1, 2))
def test_recovered_is_the_share_given_back(original: float, cost: float, share: float) -> None:
    start = original + cost
    assert recovered(start, start, original) == 0
    assert recovered(start, original, original) == 1
    assert recovered(start, start - share * cost, original) == pytest.approx(share, abs=1e-9)


def test_an_original_has_nothing_to_recover() -> None:
    """Its own collapse cost nothing; neither does a cost that noise would hide say anything."""
    assert recovered(3.5, 2.6, 3.5) is None
    assert recovered(3.55, 2.6, 3.5) is None
    original = arm_of([(0, 3.5), (1000, 2.6)], name="original")
    assert measure(original, 1000, original, None, 3.5).recovered is None


def test_measures_of_reference_arm_and_scratch_after_the_same_tokens() -> None:
    """The others went on: what they reach later does not count."""
    original = arm_of([(0, 3.5), (1000, 2.5), (2000, 2.0)], name="original")
    scratch = arm_of([(0, 11.0), (1000, 6.5), (2000, 3.0)], name="scratch")
    arm = arm_of([(0, 6.0), (100, 5.0), (1000, 3.0)])
    measured = measure(arm, 1000, original, scratch, 3.5)
    assert measured.inheritance == spread([(6.5 - 3.0) / (6.5 - 2.5)])
    assert measured.recovered == spread([(6.0 - 3.0) / (6.0 - 3.5)])
    assert measured.final == 3.0
    told = [None if loss is None else loss.spread.mean for loss in measured.losses]
    assert told[0] == 6.0
    assert told[1:3] == [None, None]  # 10 and 50 tokens come before the first evaluation
    assert told[3] == 5.0
    assert measured.losses[4] is not None and measured.losses[4].interpolated
    assert measure(scratch, 1000, original, scratch, 3.5).inheritance == spread([0.0])
    assert measure(original, 1000, original, scratch, 3.5).inheritance == spread([1.0])
    assert measure(arm, 1000, original, None, None).inheritance is None


def test_seeds_are_compared_with_their_like() -> None:
    """A seed sets the order of the data, so what it does to all arms alike must not count as noise."""
    original = arm_of([(0, 3.5), (1000, 2.5)], [(0, 3.5), (1000, 2.9)], name="original")
    scratch = arm_of([(0, 11.0), (1000, 6.5)], [(0, 11.0), (1000, 6.9)], name="scratch")
    arm = arm_of([(0, 6.0), (1000, 3.0)], [(0, 6.0), (1000, 3.4)], [(0, 6.0), (1000, 3.2)])
    found = measure(arm, 1000, original, scratch, 3.5).inheritance
    assert found is not None
    assert (found.mean, found.deviation) == (pytest.approx(3.5 / 4), pytest.approx(0))  # the third: of the means
    assert measure(scratch, 1000, original, scratch, 3.5).inheritance == spread([0.0, 0.0])


def test_rounds_recover_from_their_last_collapse() -> None:
    rounds = Arm(
        "rounds",
        (
            run_of(
                Segment(5, tuple(points([(0, 6.0), (500, 3.0)]))), Segment(4, tuple(points([(500, 5.0), (1000, 4.0)])))
            ),
        ),
    )
    measured = measure(rounds, 1000, None, None, 3.0)
    assert measured.recovered == spread([0.5])
    assert measured.reached == (None,)  # the first round was there, but with more layers


def test_an_arm_that_starts_just_after_the_budget_has_recovered_nothing() -> None:
    """Refinement ended within NEAR of it, so its first evaluation counts as made there."""
    arm = arm_of([(330_000, 5.0), (660_000, 4.0)])
    measured = measure(arm, 327_680, None, None, 3.2)
    assert (measured.final, measured.recovered) == (5.0, spread([0.0]))


@given(st.lists(CURVES, min_size=1, max_size=4))
def test_means_over_seeds(curves: list[list[tuple[int, float]]]) -> None:
    arm = arm_of(*curves)
    found = arm_loss(arm, 0)
    assert found is not None
    assert found.spread.mean == pytest.approx(9.0)
    shared = set.intersection(*({tokens for tokens, _ in curve} for curve in curves))
    (segment,) = mean_curve(arm)
    assert [p.tokens for p in segment] == sorted(shared)
    for p in segment:
        losses = [dict(curve)[p.tokens] for curve in curves]
        assert p.loss == pytest.approx(np.mean(losses))
        assert p.deviation == (None if len(curves) == 1 else pytest.approx(np.std(losses, ddof=1), abs=1e-9))


def test_a_mean_needs_every_seed() -> None:
    arm = arm_of([(0, 9.0), (100, 5.0)], [(0, 9.0), (100, 5.0), (1000, 4.0)])
    assert arm_loss(arm, 1000) is None
    assert arm.budget == 100
