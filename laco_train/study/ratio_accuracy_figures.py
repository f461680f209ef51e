"""Mean accuracies over the share of the parameters that is removed, in the looks of the losses."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from matplotlib.figure import Figure

from laco_train.analysis.figures import Picture
from laco_train.study.ratio_accuracy import MeanAccuracies
from laco_train.study.ratio_figures import (
    Curve,
    Mark,
    curves_of,
    draw_curve,
    draw_level,
    finish,
    limit_to,
    place_ticks,
)
from laco_train.study.ratios import ORIGINAL, Line, OverRatios, Quantity

_APART = 0.01
"""Between the bars of two arms at one ratio, as a share of the width."""


def mean_accuracy_pictures(found: OverRatios, means: MeanAccuracies) -> list[Picture]:
    """One figure right after the collapse and one after training; none where nothing was measured."""
    return [
        Picture(
            f"accuracy_{q.key}",
            f"{means.title} {q.title} against parameters removed",
            partial(_figure, found, means, q),
        )
        for q in means.quantities
    ]


def _figure(found: OverRatios, means: MeanAccuracies, q: Quantity) -> Figure:
    figure = Figure(figsize=(5.2, 5.0))
    axes = figure.subplots()
    curves = curves_of(found, partial(_points, means=means, q=q))
    original, chance = means.at(q.key, ORIGINAL, 0.0), means.chance(q.key)
    levels = [*([] if original is None else [original.estimate.value]), *([] if chance is None else [chance])]
    ends = [end for curve in curves for point in curve.points for end in (point.low, point.high)]
    limit_to(axes, min(ends + levels), max(ends + levels))
    place_ticks(axes, found)
    said = "{:.3f}".format
    drawn = [draw_curve(axes, curve, said, bars=True) for curve in _side_by_side(curves, axes.get_xlim())]
    if original is not None:
        drawn.append(draw_level(axes, f"{ORIGINAL} {said(original.estimate.value)}", original.estimate.value))
    if chance is not None:
        drawn.append(draw_level(axes, f"chance {said(chance)}", chance, (0, (3, 2)), 0.8))
    finish(axes, drawn, f"{means.label} {q.title}")
    return figure


def _side_by_side(curves: Sequence[Curve], ends: tuple[float, float]) -> list[Curve]:
    """`curves` a little apart, so that no bar hides another; `ends` of the axis are in percent."""
    step, middle = _APART * (ends[1] - ends[0]) / 100, (len(curves) - 1) / 2
    return [
        replace(
            curve,
            points=[replace(point, removed=point.removed + (index - middle) * step) for point in curve.points],
        )
        for index, curve in enumerate(curves)
    ]


def _points(line: Line, means: MeanAccuracies, q: Quantity) -> list[Mark]:
    """Where the accuracy is known, with its standard error."""
    points = []
    for level in line.levels:
        if (one := means.at(q.key, line.name, level.ratio)) is not None:
            value, error = one.estimate.value, one.estimate.error or 0.0
            points.append(Mark(level.removed, value, value - error, value + error))
    return points
