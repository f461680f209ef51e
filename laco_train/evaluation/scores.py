"""Accuracies with their errors, and what a difference of two is worth. Pure; Q is the number of questions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 1.96
"""Standard errors on each side that hold 95% of a normal distribution."""


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error; the error is None where fewer than two values were seen."""

    value: float
    error: float | None


@dataclass(frozen=True)
class TaskScore:
    """One model on one task.

    Attributes:
        task: name, the harness's own.
        metric: what is right, such as ``acc_norm``.
        values: of each of Q questions, 1 for right and 0 for wrong.
        questions: hash of the Q prompts with their choices, in order: equal means the same questions.
        chance: share right of uniform guesses; None where answers are free text.
        same_answer: share right of always giving the most frequent answer; None where choices differ by question.
        data: where the questions came from.
    """

    task: str
    metric: str
    values: tuple[float, ...]
    questions: str
    chance: float | None
    same_answer: float | None
    data: str

    @property
    def estimate(self) -> Estimate:
        """Accuracy."""
        return mean_estimate(self.values)


@dataclass(frozen=True)
class Difference:
    """Model minus baseline on one task, or the mean of several.

    Attributes:
        value: difference of accuracies.
        error: its standard error; None if unknown.
        paired: whether the error is that of the differences question by question.
    """

    value: float
    error: float | None
    paired: bool

    @property
    def within_noise(self) -> bool:
        """Whether 0 lies in the 95% interval; an unknown error counts as noise."""
        return self.error is None or abs(self.value) <= CONFIDENCE * self.error


def mean_estimate(values: Sequence[float]) -> Estimate:
    """Mean of `values` and its standard error, s / sqrt(Q), s from Q - 1 degrees of freedom, as the harness has it.

    Where all values are alike that would be 0, as if 0 of 12 were certain: the error is then 1 / Q, that of the same
    values with one of them 1 off.
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return Estimate(mean, None)
    if len(set(values)) == 1:
        return Estimate(mean, 1 / count)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Estimate(mean, math.sqrt(variance / count))


def difference(model: TaskScore, baseline: TaskScore) -> Difference:
    """Model minus baseline, paired where both answered the same questions.

    Paired: the standard error of the mean difference by question. Else: sqrt(e_model^2 + e_baseline^2).
    """
    if model.questions == baseline.questions:
        pairs = zip(model.values, baseline.values, strict=True)
        of_pairs = mean_estimate([mine - other for mine, other in pairs])
        return Difference(of_pairs.value, of_pairs.error, paired=True)
    mine, other = model.estimate, baseline.estimate
    return Difference(mine.value - other.value, _root_sum(mine.error, other.error), paired=False)


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """Mean over tasks, each counting the same; errors of tasks are independent."""
    count = len(estimates)
    error = _root_sum(*(one.error for one in estimates))
    return Estimate(math.fsum(one.value for one in estimates) / count, None if error is None else error / count)


def mean_difference(differences: Sequence[Difference]) -> Difference:
    """Mean over tasks of what `difference` gave for each."""
    mean = mean_of([Estimate(one.value, one.error) for one in differences])
    return Difference(mean.value, mean.error, all(one.paired for one in differences))


def kept(model: Estimate, baseline: Estimate) -> float | None:
    """Share of the baseline's accuracy that is left, the paper's measure; None for a baseline of 0."""
    return model.value / baseline.value if baseline.value > 0 else None


def no_better_than_chance(score: TaskScore) -> bool:
    """Whether the accuracy is at most 1.96 standard errors above chance; False where chance has no number."""
    return is_chance(score.estimate, score.chance)


def is_chance(estimate: Estimate, chance: float | None) -> bool:
    """Whether `estimate` is at most 1.96 standard errors above `chance`; an unknown error counts as chance."""
    return chance is not None and (estimate.error is None or estimate.value <= chance + CONFIDENCE * estimate.error)


def _root_sum(*errors: float | None) -> float | None:
    known = [error for error in errors if error is not None]
    return math.sqrt(math.fsum(error**2 for error in known)) if len(known) == len(errors) else None
