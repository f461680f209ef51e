"""Figures over the share of the parameters that is removed: one line an arm."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from laco_train.analysis.figures import Picture
from laco_train.study.figures import Look, decades, label_ends, looks
from laco_train.study.ratios import Level, Line, OverRatios, Quantity, perplexity

_FAR = 3
"""Lines that end so many times further from the median than that is from the best are cut off in a figure of losses."""


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
    lines = [line for line in found.lines if _points(line, q)]
    values = [[shown(mean) for _, mean, _ in _points(line, q)] for line in lines]
    _limit(axes, found, values, None if original is None else shown(original.mean), log)
    ends = []
    for line, look in zip(lines, looks([False] * len(lines)), strict=True):
        x, value = _draw(axes, line, q, look, shown)
        ends.append((f"{line.name} {said(value)}", x, value, look))
    if original is not None:
        grey = Look(mpl.rcParams["text.color"], "", (0, (1, 3)))
        axes.axhline(shown(original.mean), color=grey.color, linestyle=grey.line, linewidth=1.2, zorder=1)
        ends.append((f"original {said(shown(original.mean))}", axes.get_xlim()[1], shown(original.mean), grey))
    label_ends(axes, ends)
    axes.set_ylabel(f"perplexity {q.title}" if log else f"loss {q.title} (nats per token)")
    axes.set_xlabel("parameters removed, and layers left")
    axes.grid(alpha=0.5)
    axes.set_axisbelow(True)
    return figure


def _points(line: Line, q: Quantity) -> list[tuple[Level, float, float]]:
    """(level, mean, deviation) where the quantity is known."""
    known = [(level, value) for level in line.levels if (value := level.values[q.key]) is not None]
    return [(level, value.mean, value.deviation or 0.0) for level, value in known]


def _draw(axes: Axes, line: Line, q: Quantity, look: Look, shown: Callable[[float], float]) -> tuple[float, float]:
    """Draw one arm, and return where it ends."""
    points = _points(line, q)
    xs, values = [100 * level.removed for level, _, _ in points], [shown(mean) for _, mean, _ in points]
    shape: dict[str, Any] = {"color": look.color, "linestyle": look.line, "linewidth": 1.8, "zorder": 3}
    axes.plot(xs, values, marker=look.marker or None, markersize=5, **shape)
    if any(deviation for _, _, deviation in points):
        low, high = ([shown(mean + sign * deviation) for _, mean, deviation in points] for sign in (-1, 1))
        axes.fill_between(xs, low, high, color=look.color, alpha=0.18, linewidth=0)
    return xs[-1], values[-1]


def _limit(axes: Axes, found: OverRatios, lines: Sequence[Sequence[float]], original: float | None, log: bool) -> None:
    known = [value for line in lines for value in line]
    bottom, top = min([*known, *([] if original is None else [original])]), max([*known, original or 0.0])
    if log:
        axes.set_yscale("log")
        axes.set_ylim(bottom / 1.15, top * 1.15)
        axes.set_yticks(decades(bottom / 1.15, top * 1.15))
        axes.yaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:,.0f}" if value < 1e6 else _power(value))
        )
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        ends = sorted(line[-1] for line in lines)
        middle = ends[len(ends) // 2]
        near = [line for line in lines if line[-1] <= middle + _FAR * (middle - ends[0]) + 0.1]
        top = max([value for line in near for value in line] + [original or 0.0])
        axes.set_ylim(bottom - 0.04 * (top - bottom), top + 0.04 * (top - bottom))
    _ticks(axes, found)


def _ticks(axes: Axes, found: OverRatios) -> None:
    places = {level.depth: 100 * level.removed for line in found.lines for level in line.levels}
    axes.set_xticks(list(places.values()), [f"{x:.0f}%\n{depth}" for depth, x in places.items()])
    first, last = min(places.values()), max(places.values())
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
