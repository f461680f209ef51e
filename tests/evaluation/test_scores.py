"""Errors and differences, against the textbook and against repeated draws."""

import math
import random
import statistics

import pytest

from laco_train.evaluation.scores import (
    Difference,
    Estimate,
    TaskScore,
    difference,
    kept,
    mean_difference,
    mean_estimate,
    mean_of,
    no_better_than_chance,
)


def score(values: list[float], questions: str = "q", chance: float | None = 0.5) -> TaskScore:
    return TaskScore("piqa", "acc", tuple(values), questions, chance, None, "here")


def test_mean_and_standard_error() -> None:
    values = [1.0, 0.0, 1.0, 1.0, 0.0]
    found = mean_estimate(values)
    assert found.value == 0.6
    assert found.error == pytest.approx(statistics.stdev(values) / math.sqrt(5))
    assert mean_estimate([1.0]).error is None


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_answers_all_alike_are_no_certainty(value: float) -> None:
    found = mean_estimate([value] * 12)
    one_off = mean_estimate([value] * 11 + [1 - value])
    assert found.value == value
    assert found.error == pytest.approx(one_off.error) == pytest.approx(1 / 12)
    assert not no_better_than_chance(score([1.0] * 12))
    assert no_better_than_chance(score([1.0] * 3))  # guessed in one of eight tries


def test_standard_error_is_that_of_repeated_draws() -> None:
    draw = random.Random(0)
    samples = [[float(draw.random() < 0.7) for _ in range(200)] for _ in range(400)]
    spread = statistics.stdev(statistics.fmean(one) for one in samples)
    claimed = statistics.fmean(mean_estimate(one).error or 0 for one in samples)
    assert claimed == pytest.approx(spread, rel=0.1)


def test_pairing_sees_what_two_errors_hide() -> None:
    baseline = score([1.0] * 70 + [0.0] * 30)
    worse = score([1.0] * 62 + [0.0] * 38)  # wrong wherever the baseline is, and on eight more
    paired = difference(worse, baseline)
    assert paired.paired and not paired.within_noise
    assert paired.error == pytest.approx(statistics.stdev([-1.0] * 8 + [0.0] * 92) / 10)
    apart = difference(score(list(worse.values), "other questions"), baseline)
    assert not apart.paired and apart.within_noise
    assert apart.value == pytest.approx(paired.value) == pytest.approx(-0.08)
    assert apart.error == pytest.approx(math.hypot(worse.estimate.error or 0, baseline.estimate.error or 0))


def test_noise_begins_at_196_standard_errors() -> None:
    assert Difference(0.0195, 0.01, True).within_noise
    assert not Difference(-0.0197, 0.01, True).within_noise
    assert Difference(0.3, None, True).within_noise
    assert difference(score([1, 0, 1]), score([1, 0, 1])).within_noise


def test_means_over_tasks_count_each_the_same() -> None:
    mean = mean_of([Estimate(0.2, 0.03), Estimate(0.6, 0.04)])
    assert (mean.value, mean.error) == (pytest.approx(0.4), pytest.approx(0.025))
    assert mean_of([Estimate(0.2, None), Estimate(0.6, 0.04)]).error is None
    both = mean_difference([Difference(-0.1, 0.03, True), Difference(0.0, 0.04, False)])
    assert (both.value, both.error, both.paired) == (pytest.approx(-0.05), pytest.approx(0.025), False)


def test_share_kept() -> None:
    assert kept(Estimate(0.3, None), Estimate(0.4, None)) == pytest.approx(0.75)
    assert kept(Estimate(0.3, None), Estimate(0.0, None)) is None


def test_no_better_than_chance() -> None:
    assert no_better_than_chance(score([1.0] * 55 + [0.0] * 45))
    assert not no_better_than_chance(score([1.0] * 75 + [0.0] * 25))
    assert no_better_than_chance(score([0.0] * 100))
    assert not no_better_than_chance(score([0.0] * 100, chance=None))
