"""Figures over the share of the parameters that is removed: one line an arm."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from laco_train.analysis.figures import Picture
from laco_train.study.figures import Look, decades, label_ends, looks
from laco_train.study.ratios import Line, OverRatios, Quantity, perplexity

End = tuple[str, float, float, Look]
"""Where a line ends: its label, x and y in the axes' units, and how it is drawn."""
_APART = 0.07
"""Share of the axis between labels below it, at least."""
_FAR = 3
"""Lines that end so many times further from the median than that is from the best are cut off in a figure of losses."""


@dataclass(frozen=True)
class Mark:
    """A value over a ratio.

    Attributes:
        removed: share of all parameters that is gone.
        value: in the figure's unit.
        low, high: ends of its band or bar; both are the value where there is none.
    """

    removed: float
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """An arm in a figure: one point or more, the smallest ratio first, and how it is drawn."""

    name: str
    points: list[Mark]
    look: Look


def ratio_pictures(found: OverRatios) -> list[Picture]:
    """For each quantity perplexity on a logarithmic scale, and the lower part of the losses."""
    pictures = []
    for q in found.quantities:
        draw = partial(_figure, found, q)
        pictures += [
            Picture(f"perplexity_{q.key}", f"Perplexity {q.title} against parameters removed", partial(draw, True)),
            Picture(f"loss_{q.key}", f"Loss {q.title} against parameters removed", partial(draw, False)),
        ]
    return pictures


def _figure(found: OverRatios, q: Quantity, log: bool) -> Figure:
    figure = Figure(figsize=(5.2, 5.0))
    axes = figure.subplots()
    shown = perplexity if log else float
    said: Callable[[float], str] = number if log else "{:.3f}".format
    original = None if found.original is None else found.original.values[q.key]
    curves = curves_of(found, partial(_points, q=q, shown=shown))
    level = None if original is None else shown(original.mean)
    _limit(axes, [curve.points for curve in curves], level, log)
    place_ticks(axes, found)
    ends = [draw_curve(axes, curve, said) for curve in curves]
    if level is not None:
        ends.append(draw_level(axes, f"original {said(level)}", level))
    finish(axes, ends, f"perplexity {q.title}" if log else f"loss {q.title} (nats per token)")
    return figure


def curves_of(found: OverRatios, points_of: Callable[[Line], list[Mark]]) -> list[Curve]:
    """The arms that have any point, each in the look that it has in all figures."""
    drawn_as = looks([False] * len(found.lines))
    each = [Curve(line.name, points_of(line), look) for line, look in zip(found.lines, drawn_as, strict=True)]
    return [curve for curve in each if curve.points]


def _points(line: Line, q: Quantity, shown: Callable[[float], float]) -> list[Mark]:
    """Where the quantity is known, with the standard deviation over seeds."""
    points = []
    for level in line.levels:
        if (value := level.values[q.key]) is not None:
            low, high = (shown(value.mean + sign * (value.deviation or 0.0)) for sign in (-1, 1))
            points.append(Mark(level.removed, shown(value.mean), low, high))
    return points


def draw_curve(axes: Axes, curve: Curve, said: Callable[[float], str], *, bars: bool = False) -> End:
    """Draw one arm, with a band about it, or with bars if asked and where a band would have no width; return its end.

    Args:
        axes: with limits and ticks.
        curve: the arm.
        said: its last value as text.
        bars: instead of a band.
    """
    xs, values = [100 * point.removed for point in curve.points], [point.value for point in curve.points]
    look = curve.look
    shape: dict[str, Any] = {"color": look.color, "linestyle": look.line, "linewidth": 1.8, "zorder": 3}
    axes.plot(xs, values, marker=look.marker or None, markersize=5, **shape)
    low, high = [point.low for point in curve.points], [point.high for point in curve.points]
    if low == high:
        pass
    elif bars or len(xs) == 1:
        axes.vlines(xs, low, high, color=look.color, linewidth=1, zorder=3)
    else:
        axes.fill_between(xs, low, high, color=look.color, alpha=0.18, linewidth=0)
    return f"{curve.name} {said(values[-1])}", xs[-1], values[-1], look


def draw_level(axes: Axes, text: str, value: float, line: Any = (0, (1, 3)), width: float = 1.2) -> End:
    """Draw a horizontal line in the text's colour, and return where it ends, with `text` as its label."""
    look = Look(mpl.rcParams["text.color"], "", line)
    axes.axhline(value, color=look.color, linestyle=line, linewidth=width, zorder=1)
    return text, axes.get_xlim()[1], value, look


def finish(axes: Axes, ends: Sequence[End], label: str) -> None:
    """Names at the ends of lines, labels of both axes, and a grid."""
    label_ends(axes, ends)
    axes.set_ylabel(label)
    axes.set_xlabel("parameters removed (%), and layers left")
    axes.grid(alpha=0.5)
    axes.set_axisbelow(True)


def _limit(axes: Axes, lines: Sequence[Sequence[Mark]], original: float | None, log: bool) -> None:
    level = [] if original is None else [original]
    known = [*level, *(end for line in lines for point in line for end in (point.low, point.high))]
    if log:
        bottom, top = min(known) / 1.15, max(known) * 1.15
        axes.set_yscale("log")
        axes.set_ylim(bottom, top)
        ticks = decades(bottom, top)
        even = [tick for tick in MaxNLocator(5).tick_values(bottom, top) if bottom <= tick <= top]
        axes.set_yticks(ticks if len(ticks) > 1 else even)
        axes.yaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:,.6g}" if value < 1e6 else _power(value))
        )
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        ends = sorted(line[-1].value for line in lines)
        middle = ends[len(ends) // 2]
        near = [line for line in lines if line[-1].value <= middle + _FAR * (middle - ends[0]) + 0.1]
        limit_to(axes, min(known), max([point.high for line in near for point in line] + level))


def limit_to(axes: Axes, bottom: float, top: float) -> None:
    """Limits that leave some room about values from `bottom` to `top`, which may be alike."""
    room = 0.04 * (top - bottom) or 0.05 * abs(top) or 0.05
    axes.set_ylim(bottom - room, top + room)


def place_ticks(axes: Axes, found: OverRatios) -> None:
    """A tick for each number of layers left; where two would overlap, for the one that more arms have."""
    levels = [level for line in found.lines for level in line.levels]
    places = {level.depth: 100 * level.removed for level in levels}
    first, last = min(places.values()), max(places.values())
    arms, kept = Counter(level.depth for level in levels), list[int]()
    for depth in sorted(places, key=lambda depth: (-arms[depth], -depth)):
        if all(abs(places[depth] - places[other]) >= _APART * (last - first) for other in kept):
            kept.append(depth)
    kept.sort(reverse=True)
    axes.set_xticks([places[depth] for depth in kept], [f"{places[depth]:.0f}\n{depth}" for depth in kept])
    room = 0.06 * (last - first) or 1.0
    axes.set_xlim(first - room, last + room)


def number(value: float) -> str:
    """A perplexity: three digits or more, powers of ten from a million."""
    if value == math.inf:
        return "infinite"
    if value >= 1e6:
        return _power(value)
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _power(value: float) -> str:
    digits, power = f"{value:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(power)}"
