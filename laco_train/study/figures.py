"""Curves of a comparison: told apart by marker, line style and a label at their end, so colour is never needed."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from laco_train.analysis.figures import Picture
from laco_train.study.measures import MeanPoint
from laco_train.study.tables import count

# Okabe and Ito's colours without the yellow, which paper swallows, and greys; readable on white and on black
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#4ba3d8", "#b8860b", "#7f7f7f", "#9467bd")
_MARKERS = "osD^vPXd<>"
_LINES: tuple[Any, ...] = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
_GAP = 0.066
"""Between two labels, as a share of the height."""


@dataclass(frozen=True)
class Line:
    """An arm in a figure: a list of points a segment; `plain` for the original, drawn in the text's colour."""

    name: str
    segments: list[list[MeanPoint]]
    depths: list[int]
    plain: bool = False


@dataclass(frozen=True)
class Look:
    """How a line is drawn."""

    color: str
    marker: str
    line: Any


@dataclass(frozen=True)
class _Axis:
    """What a figure has to the right: where a point lies, in which unit, and whether its scale is logarithmic."""

    of: Callable[[MeanPoint], float | None]
    label: str
    log: bool
    ticks: Callable[[float], str]


def curve_pictures(lines: Sequence[Line], original: float | None) -> list[Picture]:
    """Figures of `lines`: over tokens on a log and on a linear scale, over time and over FLOPs where they are known.

    Args:
        lines: the arms.
        original: loss of the original before training, drawn as a level; None if unknown.
    """
    tokens = _Axis(lambda p: p.tokens, "tokens trained on (logarithmic scale; 0 at its left end)", True, count)
    linear = _Axis(lambda p: p.tokens, "tokens trained on", False, count)
    draw = partial(_figure, lines, original)
    found = [
        Picture("curves", "Validation loss against tokens, logarithmic scale", partial(draw, tokens, False)),
        Picture("curves_linear", "Validation loss against tokens, its lower part", partial(draw, linear, True)),
    ]
    longest = max((p.seconds for line in lines for s in line.segments for p in s if p.seconds is not None), default=0.0)
    if longest > 0:
        unit, name = next(
            (u, n) for u, n in ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds")) if longest > 2 * u or u == 1
        )
        time = _Axis(
            lambda p: None if p.seconds is None else p.seconds / unit, f"training time ({name})", False, "{:g}".format
        )
        found.append(Picture("curves_time", "Validation loss against training time", partial(draw, time, True)))
    if any(p.flops for line in lines for s in line.segments for p in s):
        flops = _Axis(lambda p: p.flops, "floating-point operations of training (logarithmic scale)", True, _power)
        found.append(Picture("curves_flops", "Validation loss against training FLOPs", partial(draw, flops, False)))
    return found


def _power(value: float) -> str:
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.0e}".split("e")
    power = f"$10^{{{int(exponent)}}}$"
    return power if mantissa == "1" else f"${mantissa}\\cdot$" + power


def looks(plain: Sequence[bool]) -> list[Look]:
    """One for each line, all unlike; in the text's colour and without a marker where it is `plain`."""
    found, used = [], 0
    for one in plain:
        if one:
            found.append(Look(mpl.rcParams["text.color"], "", "-"))
        else:
            found.append(Look(_COLORS[used % len(_COLORS)], _MARKERS[used % len(_MARKERS)], _LINES[used % len(_LINES)]))
            used += 1
    return found


def _figure(lines: Sequence[Line], original: float | None, axis: _Axis, lower: bool) -> Figure:
    figure = Figure(figsize=(5.2, 5.0))
    axes = figure.subplots()
    ends = []
    firsts = [x for line in lines for s in line.segments for p in s if (x := axis.of(p)) is not None and x > 0]
    if axis.log and firsts:
        axes.set_xscale("symlog", linthresh=min(firsts), linscale=0.35)
    drawn_as = looks([line.plain for line in lines])
    for line, look in zip(lines, drawn_as, strict=True):
        drawn = _draw(axes, line, look, axis)
        if drawn is not None:
            ends.append((f"{line.name} {drawn[1]:.3f}", *drawn, look))
    if original is not None:
        grey = Look(mpl.rcParams["text.color"], "", (0, (1, 3)))
        axes.axhline(original, color=grey.color, linestyle=grey.line, linewidth=1.2, zorder=1)
    _limit(axes, lines, original, axis, lower)
    if original is not None:
        ends.append((f"orig. start {original:.3f}", axes.get_xlim()[1], original, grey))
    for line, look in zip(lines, drawn_as, strict=True):
        _mark_collapses(axes, line, look, axis)
    label_ends(axes, ends)
    axes.set_ylabel("validation loss (nats per token" + (", log)" if axes.get_yscale() == "log" else ")"))
    axes.set_xlabel(axis.label)
    axes.grid(alpha=0.5)
    axes.set_axisbelow(True)
    return figure


def _draw(axes: Axes, line: Line, look: Look, axis: _Axis) -> tuple[float, float] | None:
    """Draw one arm, and return where it ends."""
    end = None
    for segment in line.segments:
        points = [(x, p) for p in segment if (x := axis.of(p)) is not None]
        if not points:
            return None
        xs, losses = [x for x, _ in points], [p.loss for _, p in points]
        shape: dict[str, Any] = {"color": look.color, "linestyle": look.line, "linewidth": 1.8, "zorder": 3}
        shape |= {"marker": look.marker or None, "markersize": 5, "markevery": max(1, len(xs) // 12)}
        axes.plot(xs, losses, **shape)
        if any(p.deviation for _, p in points):
            low, high = ([p.loss + sign * (p.deviation or 0.0) for _, p in points] for sign in (-1, 1))
            axes.fill_between(xs, low, high, color=look.color, alpha=0.18, linewidth=0)
        if end is not None:
            axes.plot([end[0], xs[0]], [end[1], losses[0]], color=look.color, linestyle=":", linewidth=1.2)
        end = (xs[-1], losses[-1])
    return end


def _mark_collapses(axes: Axes, line: Line, look: Look, axis: _Axis) -> None:
    """Say to how many layers each round collapsed, where its curve begins, or at the top if that lies above."""
    for depth, segment in list(zip(line.depths, line.segments, strict=True))[1:]:
        x, loss = axis.of(segment[0]), min(segment[0].loss, axes.get_ylim()[1])
        if x is not None:
            text = f"{line.name} to {depth} layers"
            height = axes.transAxes.inverted().transform(axes.transData.transform((x, loss)))[1]
            away, edge = (-2, "top") if height > 0.5 else (2, "bottom")  # else it would leave the figure
            place: dict[str, Any] = {"xytext": (-3, away), "textcoords": "offset points", "ha": "right", "va": edge}
            behind = {"facecolor": axes.get_facecolor(), "edgecolor": "none", "alpha": 0.75, "pad": 0.8}
            axes.annotate(text, (x, loss), **place, fontsize=9, color=look.color, rotation=90, bbox=behind, zorder=5)


def _limit(axes: Axes, lines: Sequence[Line], original: float | None, axis: _Axis, lower: bool) -> None:
    """Set limits and ticks; of the lower part of the losses only, if asked, where ends lie that differ little."""
    ends = sorted(line.segments[-1][-1].loss for line in lines if line.segments and line.segments[-1])
    starts = [p.loss for line in lines for s in line.segments for p in s]
    bottom, top = min(starts), max(starts)
    if lower:
        middle = ends[len(ends) // 2]
        near = [loss for loss in ends if loss <= middle + 3 * (middle - ends[0]) + 0.1]
        top = min(top, max(*near, original or 0.0, middle) + 0.5 * (max(*near, original or 0.0, middle) - bottom))
    else:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    margin = 0.04 * (top - bottom) if lower else 0.02 * bottom
    axes.set_ylim(bottom - margin, top + margin)
    nonzero = [x for line in lines for s in line.segments for p in s if (x := axis.of(p))]
    furthest = max(nonzero, default=1.0)
    axes.set_xlim(0 if axis.log else -0.02 * furthest, furthest * (1.15 if axis.log else 1.02))
    if axis.log:  # below the first evaluation the scale is linear, and its decades would lie on the 0
        axes.set_xticks([0.0, *decades(min(nonzero, default=1.0), 1.15 * furthest)])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: axis.ticks(value)))
    axes.xaxis.set_minor_locator(NullLocator())


def decades(low: float, high: float) -> list[float]:
    """Powers of ten from `low` to `high`, and twice and five times these if they are fewer than two."""
    powers = range(int(math.log10(low)), int(math.log10(high)) + 1)
    found = [n * 10.0**power for power in powers for n in (1, 2, 5) if low <= n * 10.0**power <= high]
    whole = [value for value in found if math.log10(value).is_integer()]
    return whole if len(whole) >= 2 else found


def label_ends(axes: Axes, ends: Sequence[tuple[str, float, float, Look]]) -> None:
    """Names beside the right edge, each as near to the height of its line's end as the others leave room for."""
    if not ends:
        return
    low, high = axes.get_ylim()
    axes.figure.canvas.draw()  # places the axes, which the scale below needs
    scale = axes.transData + axes.transAxes.inverted()
    heights = [scale.transform((0, min(max(loss, low), high)))[1] for _, _, loss, _ in ends]
    order = sorted(range(len(ends)), key=lambda index: heights[index])
    placed = spaced([heights[index] for index in order], _GAP)
    for index, height in zip(order, placed, strict=True):
        name, x, loss, look = ends[index]
        text = name if loss <= high else f"{name} ↑"
        edge: dict[str, Any] = {"transform": axes.transAxes, "clip_on": False, "color": look.color}
        if loss <= high:
            lead = {"arrowstyle": "-", "linewidth": 0.6, "color": look.color, "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", (x, loss), (1.035, height), "data", "axes fraction", arrowprops=lead)
        axes.plot([1.035, 1.085], [height, height], linestyle=look.line, linewidth=1.8, **edge)
        if look.marker:
            axes.plot([1.06], [height], marker=look.marker, markersize=5, **edge)
        axes.text(1.1, height, text, va="center", fontsize=9.5, transform=axes.transAxes)


def spaced(heights: Sequence[float], gap: float) -> list[float]:
    """`heights` moved by little, so that they are `gap` apart: groups that collide spread about their middle.

    Args:
        heights: wanted, in rising order, 0 to 1.
        gap: least distance of two neighbours.

    Returns:
        In the same order; none is below 0.
    """
    groups: list[tuple[float, int]] = []  # middle and members
    for height in heights:
        middle, members = height, 1
        while groups and middle - groups[-1][0] < gap * (members + groups[-1][1]) / 2:
            below, more = groups.pop()
            middle, members = (middle * members + below * more) / (members + more), members + more
            middle = max(middle, gap * (members - 1) / 2)
        groups.append((middle, members))
    return [middle + (index - (members - 1) / 2) * gap for middle, members in groups for index in range(members)]
