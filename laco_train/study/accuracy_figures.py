"""Accuracies against tokens, in the looks of the curves."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from laco_train.analysis.figures import Picture
from laco_train.study.accuracy import MEAN, Moment, accuracy_curve, columns_of
from laco_train.study.curves import Arm
from laco_train.study.figures import Look, decades, label_ends, looks
from laco_train.study.tables import count


def accuracy_pictures(arms: Sequence[Arm], reference: str) -> list[Picture]:
    """One figure a task, and one of their mean if they are several; none where no arm was measured.

    Args:
        arms: in the order of the other figures, so that each keeps its look.
        reference: name of the original that is trained on, drawn in the text's colour.
    """
    curved = [arm for arm in arms if arm.budget]
    drawn_as = looks([arm.name == reference for arm in curved])
    found = []
    for name, tasks in columns_of(curved).items():
        curves = [(arm.name, accuracy_curve(arm, tasks), look) for arm, look in zip(curved, drawn_as, strict=True)]
        label = f"accuracy, mean of {len(tasks)} tasks" if name == MEAN else f"accuracy on {name}"
        shown = [curve for curve in curves if curve[1]]
        if shown:
            alt = f"{label.capitalize()} against tokens"
            found.append(Picture(f"accuracy_{name.replace('/', '_')}", alt, partial(_figure, shown, label)))
    return found


def _figure(curves: Sequence[tuple[str, list[Moment], Look]], label: str) -> Figure:
    figure = Figure(figsize=(5.2, 5.0))
    axes = figure.subplots()
    ends: list[tuple[str, float, float, Look]] = []
    for name, moments, look in curves:
        xs, ys = [one.tokens for one in moments], [one.estimate.value for one in moments]
        shape: dict[str, Any] = {"color": look.color, "linestyle": look.line, "linewidth": 1.8, "zorder": 3}
        bars = [one.estimate.error or 0.0 for one in moments]
        axes.errorbar(xs, ys, bars, marker=look.marker or None, markersize=5, elinewidth=1, capsize=3, **shape)
        ends.append((f"{name} {ys[-1]:.3f}", xs[-1], ys[-1], look))
    first = curves[0][1][0]
    grey = Look(mpl.rcParams["text.color"], "", (0, (1, 3)))
    if first.chance is not None:
        axes.axhline(first.chance, color=grey.color, linestyle=grey.line, linewidth=1.2, zorder=1)
    after = sorted({one.tokens for _, moments, _ in curves for one in moments} - {0})
    if after:
        axes.set_xscale("symlog", linthresh=after[0], linscale=0.35)
        axes.set_xticks([0.0, *(decades(after[0], 1.15 * after[-1]) or after)])
        axes.set_xlim(0, 1.15 * after[-1])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    if first.chance is not None:
        ends.append((f"chance {first.chance:.3f}", axes.get_xlim()[1], first.chance, grey))
    label_ends(axes, ends)
    axes.set_ylabel(label)
    axes.set_xlabel("tokens trained on (logarithmic scale; 0 at its left end)")
    axes.grid(alpha=0.5)
    axes.set_axisbelow(True)
    return figure
