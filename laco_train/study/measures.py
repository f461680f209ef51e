"""From curves to measures: losses at shares of the budget, tokens to a loss, what was recovered and inherited."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from laco_train.study.curves import Arm, Point, Run

SHARES = (0.0, 0.01, 0.05, 0.1, 0.5, 1.0)
"""Of the budget, at which losses are told."""
NEAR = 0.02
"""An evaluation within this share of the tokens asked for counts as made there."""
SMALLEST_COST = 0.1
"""Nats; a collapse that cost less leaves nothing to recover that noise would not hide."""


@dataclass(frozen=True)
class Reading:
    """A loss at a number of tokens, in nats; `interpolated` unless it was evaluated there."""

    loss: float
    interpolated: bool


@dataclass(frozen=True)
class Reached:
    """Tokens at which a loss is first reached.

    Attributes:
        tokens: how many.
        how: ``exact``: at an evaluation; ``interpolated``: between two; ``at most``: before the first one.
    """

    tokens: float
    how: Literal["exact", "interpolated", "at most"]


@dataclass(frozen=True)
class Spread:
    """Mean over seeds, their standard deviation (None for a single one), and how many they are."""

    mean: float
    deviation: float | None
    count: int


def loss_at(points: Sequence[Point], tokens: float, step: float = 0.0) -> Reading | None:
    """The loss after `tokens` tokens.

    That of the nearest evaluation within `NEAR` or half a step, else between the evaluations around it, linear in the
    logarithm of tokens. At a collapse, the loss after it.

    Args:
        points: by rising tokens.
        tokens: 0 or more.
        step: tokens of an optimizer step, since none can be evaluated between two of them.

    Returns:
        None beyond the ends of the curve, and between 0 tokens and the first evaluation, which no logarithm spans.
    """
    # the model before training is none after half a step
    alike = [point for point in points if (point.tokens > 0) == (tokens > 0)]
    near = [point for point in alike if abs(point.tokens - tokens) <= max(NEAR * tokens, step / 2)]
    if near:
        distance = min(abs(point.tokens - tokens) for point in near)
        return Reading([point for point in near if abs(point.tokens - tokens) == distance][-1].loss, False)
    before = [point for point in points if point.tokens < tokens]
    after = [point for point in points if point.tokens > tokens]
    if not before or not after or before[-1].tokens == 0:
        return None
    a, b = before[-1], after[0]
    weight = math.log(tokens / a.tokens) / math.log(b.tokens / a.tokens)
    return Reading(a.loss + weight * (b.loss - a.loss), True)


def tokens_to(points: Sequence[Point], loss: float) -> Reached | None:
    """Tokens at which the curve first is at or below `loss`, linear in the logarithm of tokens between evaluations.

    Args:
        points: by rising tokens, of one segment.
        loss: nats per token.

    Returns:
        None if it never is.
    """
    for index, point in enumerate(points):
        if point.loss > loss:
            continue
        if index == 0 or point.loss == loss:
            return Reached(point.tokens, "exact")
        before = points[index - 1]
        if before.tokens == 0:
            return Reached(point.tokens, "at most")
        weight = (before.loss - loss) / (before.loss - point.loss)
        return Reached(before.tokens * (point.tokens / before.tokens) ** weight, "interpolated")
    return None


def recovered(start: float, now: float, original: float) -> float | None:
    """Share of what the collapse cost that training gave back: (L_0 - L_n) / (L_0 - L_original before training).

    Args:
        start: L_0, the loss right after the collapse.
        now: L_n, the loss after n tokens.
        original: loss of the original before training.

    Returns:
        1 where the original's loss is reached, more beyond it; None if the collapse cost less than `SMALLEST_COST`.
    """
    cost = start - original
    return (start - now) / cost if cost >= SMALLEST_COST else None


def inheritance(arm: float, scratch: float, original: float) -> float | None:
    """(L_scratch - L_arm) / (L_scratch - L_original), all three after the same number of tokens.

    Returns:
        0 for an arm no better than random weights, 1 for one as good as the original trained on; None unless the
        original is ahead of scratch.
    """
    lead = scratch - original
    return (scratch - arm) / lead if lead > 0 else None


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and standard deviation of `values`; None if there are none."""
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), deviation, len(values))


@dataclass(frozen=True)
class ArmLoss:
    """Losses of an arm's seeds after the same number of tokens; `interpolated` if any of them is."""

    spread: Spread
    interpolated: bool


@dataclass(frozen=True)
class ArmMeasures:
    """What the tables tell of an arm.

    Attributes:
        arm: whose.
        losses: at `SHARES` of the budget; None where a curve tells nothing.
        reached: of each seed, when it is back at the original's starting loss; None: never.
        recovered: at the budget; counted from the last collapse, so None for random weights.
        inheritance: at the budget; against scratch and the reference of the same seed, where there are such.
    """

    arm: Arm
    losses: tuple[ArmLoss | None, ...]
    reached: tuple[Reached | None, ...]
    recovered: Spread | None
    inheritance: Spread | None

    @property
    def final(self) -> float:
        """Mean loss at the budget; infinite if that comes before the first evaluation, so nothing is known."""
        end = self.losses[-1]
        return math.inf if end is None else end.spread.mean


def arm_loss(arm: Arm, tokens: float) -> ArmLoss | None:
    """Loss of `arm` after `tokens`; None unless every seed tells it."""
    readings = [reading for run in arm.runs if (reading := _reading(run, tokens)) is not None]
    found = spread([reading.loss for reading in readings])
    if found is None or found.count < len(arm.runs):
        return None
    return ArmLoss(found, any(reading.interpolated for reading in readings))


def arm_start(arm: Arm) -> ArmLoss | None:
    """Loss of `arm` before training, which a refinement may have gone before."""
    found = spread([run.points[0].loss for run in arm.runs if run.points])
    return None if found is None else ArmLoss(found, interpolated=False)


def measure(arm: Arm, budget: int, reference: Arm | None, scratch: Arm | None, original: float | None) -> ArmMeasures:
    """All measures of `arm`.

    Args:
        arm: with curves.
        budget: tokens that shares are of; at most the arm's own.
        reference: the original, trained on; None if it was not run.
        scratch: the same shape from random weights; None if it was not run.
        original: loss of the original before training; None if unknown.
    """
    ends = [(run, reading.loss) for run in arm.runs if (reading := _reading(run, budget)) is not None]
    shares: list[float | None] = []
    inherited: list[float | None] = []
    if original is not None and not arm.runs[0].from_scratch:
        shares = [recovered(_last_start(run, budget).loss, end, original) for run, end in ends]
    if reference is not None and scratch is not None:
        for run, end in ends:
            worst, best = (_level(one, run.seed, budget) for one in (scratch, reference))
            inherited.append(None if worst is None or best is None else inheritance(end, worst, best))
    return ArmMeasures(
        arm=arm,
        losses=tuple(arm_loss(arm, share * budget) if share else arm_start(arm) for share in SHARES),
        reached=() if original is None else tuple(tokens_to(run.segments[-1].points, original) for run in arm.runs),
        recovered=spread([share for share in shares if share is not None]),
        inheritance=spread([share for share in inherited if share is not None]),
    )


def _reading(run: Run, tokens: float) -> Reading | None:
    return loss_at(run.points, tokens, run.step_tokens)


def _level(arm: Arm, seed: int | None, tokens: int) -> float | None:
    """Loss of the run of `arm` with this seed, which read the same data in the same order; else the mean of all."""
    for run in arm.runs:
        if run.seed == seed and (reading := _reading(run, tokens)) is not None:
            return reading.loss
    found = arm_loss(arm, tokens)
    return None if found is None else found.spread.mean


def _last_start(run: Run, tokens: int) -> Point:
    """The model right after the last collapse at or before `tokens`, or else after the first, which lies near them."""
    starts = [segment.points[0] for segment in run.segments]
    return next((start for start in reversed(starts) if start.tokens <= tokens), starts[0])


@dataclass(frozen=True)
class MeanPoint:
    """A validation of an arm: means over its seeds; `deviation` of the loss is None for a single one."""

    tokens: int
    loss: float
    deviation: float | None
    seconds: float | None
    flops: float | None


def mean_curve(arm: Arm) -> list[list[MeanPoint]]:
    """Curve of `arm`, a list a segment, at the tokens where all its seeds were evaluated.

    Returns:
        As many segments as the seed with the fewest has.
    """
    curve = []
    for segments in zip(*(run.segments for run in arm.runs), strict=False):
        at = [{point.tokens: point for point in segment.points} for segment in segments]
        shared = [tokens for tokens in at[0] if all(tokens in other for other in at)]
        curve.append([_mean_point([points[tokens] for points in at]) for tokens in shared])
    return curve


def _mean_point(points: Sequence[Point]) -> MeanPoint:
    loss = spread([point.loss for point in points])
    assert loss is not None
    seconds = [point.seconds for point in points if point.seconds is not None]
    flops = [point.flops for point in points if point.flops is not None]
    return MeanPoint(
        tokens=points[0].tokens,
        loss=loss.mean,
        deviation=loss.deviation,
        seconds=statistics.fmean(seconds) if len(seconds) == len(points) else None,
        flops=statistics.fmean(flops) if len(flops) == len(points) else None,
    )
