"""Heat maps and curves of an analysis, each in light and in dark."""

import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from laco_train.analysis.parameters import ModulePairs
from laco_train.analysis.result import Analysis
from laco_train.analysis.sweep import best_at_each_depth
from laco_train.web_page import Drawn

# background, text, lines and cells without a value
_LIGHT = ("#ffffff", "#1f2328", "#d0d7de")
_DARK = ("#0d1117", "#e6edf3", "#30363d")
_BLUE, _ORANGE, _GREEN = "#3b82c4", "#d9822b", "#2da44e"
_GREY = "#8c959f"
_COLORS = (_BLUE, _ORANGE, _GREEN, "#a475f9", "#db61a2", _GREY)
_MARKERS = "osD^vP"


@dataclass(frozen=True)
class Picture:
    """A figure to be drawn.

    Attributes:
        name: of its file, without suffix.
        alt: what it shows, in words.
        draw: makes it, in matplotlib's colours as they then are.
    """

    name: str
    alt: str
    draw: Callable[[], Figure]

    def png(self, *, dark: bool) -> bytes:
        """The figure for a light or a dark page."""
        stream = io.BytesIO()
        with _colors(_DARK if dark else _LIGHT):
            self.draw().savefig(stream, format="png")
        return stream.getvalue()


def draw(
    pictures: Sequence[Picture], output: Path, on_picture: Callable[[int, int], None] | None = None
) -> dict[str, Drawn]:
    """Draw `pictures`, the light ones to ``<name>.png`` in the folder `output` too.

    Args:
        pictures: what to draw.
        output: folder that exists.
        on_picture: called after each picture with how many are drawn, of how many.
    """
    shown: dict[str, Drawn] = {}
    for picture in pictures:
        drawn = Drawn(picture.alt, picture.png(dark=False), picture.png(dark=True))
        (output / f"{picture.name}.png").write_bytes(drawn.light)
        shown[picture.name] = drawn
        if on_picture is not None:
            on_picture(len(shown), len(pictures))
    return shown


@contextmanager
def _colors(palette: tuple[str, str, str]) -> Iterator[None]:
    background, text, line = palette
    changes: Any = {
        **dict.fromkeys(("figure.facecolor", "axes.facecolor"), background),
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.titlecolor"), text),
        **dict.fromkeys(("axes.edgecolor", "grid.color"), line),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": False,
        "figure.dpi": 150,
        "figure.constrained_layout.use": True,
        "font.size": 10,
    }
    with mpl.rc_context(changes):
        yield


def pictures(analysis: Analysis) -> list[Picture]:
    """All figures of `analysis`: hidden states, layers, one for each module, and the sweep if there was one."""
    found = [
        Picture("hidden_states", "Cosine of hidden states between all places", lambda: states_figure(analysis)),
        Picture("layers", "Block influence and loss without each layer", lambda: layers_figure(analysis)),
    ]
    if analysis.sweep is not None:
        found.append(Picture("sweep", "Loss, similarity and depth at each setting", lambda: sweep_figure(analysis)))
    for module in analysis.modules:
        alt = f"Cosine and relative distance of {module.name} between all pairs of layers"
        found.append(Picture(picture_name(module), alt, lambda module=module: parameters_figure(module)))  # type: ignore[misc]
    return found


def picture_name(module: ModulePairs) -> str:
    """Name of the figure of one module."""
    return "parameters_" + module.name.replace(" ", "_").replace(".", "_")


def states_figure(analysis: Analysis) -> Figure:
    """Heat map of (L + 1, L + 1) cosines of hidden states."""
    figure = Figure(figsize=(5.6, 4.8))
    axes = figure.subplots()
    _heat_map(axes, analysis.states, "cosine", "viridis")
    axes.set_xlabel("states entering layer (last: leaving the stack)")
    axes.set_ylabel("states entering layer")
    return figure


def layers_figure(analysis: Analysis) -> Figure:
    """Bars over the layers: block influence, and nats that the loss rises without the layer, on a logarithmic axis."""
    figure = Figure(figsize=(7.2, 7.2))
    above, below = figure.subplots(2, sharex=True)
    layers = range(analysis.depth)
    above.bar(layers, analysis.block_influence, color=_BLUE)
    above.set_ylabel("block influence")
    increases = analysis.increases
    below.bar(layers, increases, color=[_GREEN if value <= 0 else _ORANGE for value in increases])
    below.set_yscale("symlog", linthresh=0.1)
    below.set_ylabel("nats gained by the loss\nwithout the layer")
    below.set_xlabel("layer")
    for axes in (above, below):
        axes.grid(axis="y", alpha=0.6)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        axes.set_xlim(-0.8, analysis.depth - 0.2)
    return figure


def parameters_figure(module: ModulePairs) -> Figure:
    """Two heat maps side by side: cosine, and relative distance; the diagonal says nothing and stays empty."""
    figure = Figure(figsize=(6.4, 3.0))
    left, right = figure.subplots(1, 2)
    off_diagonal = ~torch.eye(len(module.cosine), dtype=torch.bool)
    _heat_map(left, module.cosine.where(off_diagonal, torch.nan), "cosine", "viridis")
    _heat_map(right, module.distance.where(off_diagonal, torch.nan), "relative distance", "viridis_r")
    return figure


def _heat_map(axes: Axes, values: Tensor, title: str, colors: str) -> None:
    known = values[values.isfinite()]
    low, high = (known.min().item(), known.max().item()) if known.numel() else (0.0, 1.0)
    palette = mpl.colormaps[colors].with_extremes(bad=mpl.rcParams["axes.edgecolor"])
    # a range of no width would be widened past what a cosine can be
    image = axes.imshow(values.numpy(), origin="lower", cmap=palette, vmin=low, vmax=high if high > low else low + 1e-6)
    axes.set_title(title, fontsize=10)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6, integer=True))
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.85)
    bar.ax.yaxis.set_major_locator(MaxNLocator(5))
    bar.outline.set_visible(False)


def sweep_figure(analysis: Analysis) -> Figure:
    """Loss by depth, with the best of each depth joined, and depth by threshold; a colour for each C."""
    sweep = analysis.sweep
    assert sweep is not None
    figure = Figure(figsize=(7.2, 7.2))
    above, below = figure.subplots(2)
    marks = itertools.cycle(zip(_COLORS, _MARKERS, strict=True))
    size = 120.0
    for c, (color, marker) in zip(sorted({o.layers_per_merge for o in sweep.outcomes}), marks, strict=False):
        those = [outcome for outcome in sweep.outcomes if outcome.layers_per_merge == c]
        depths = [outcome.depth for outcome in those]
        look: dict[str, Any] = {"color": color, "marker": marker, "s": size, "zorder": 3}
        above.scatter(depths, [outcome.loss for outcome in those], label=f"C = {c}", **look)
        below.scatter([outcome.similarity_threshold for outcome in those], depths, **look)
        size /= 2  # points of several C often coincide
    best = best_at_each_depth(sweep.outcomes)
    above.plot([o.depth for o in best], [o.loss for o in best], color=_GREY, linewidth=1, label="least at each depth")
    above.axhline(analysis.original_loss, color=_GREY, linestyle="--", linewidth=1, label="original")
    chosen = sweep.recommendation.outcome
    if chosen is not None:
        ring = {"s": 300, "facecolors": "none", "edgecolors": mpl.rcParams["text.color"], "linewidths": 1.5}
        above.scatter([chosen.depth], [chosen.loss], label="recommended", zorder=4, **ring)
        below.scatter([chosen.similarity_threshold], [chosen.depth], zorder=4, **ring)
    above.invert_xaxis()
    above.set_xlabel("layers that remain")
    above.set_ylabel("calibration loss (nats per token)")
    above.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    below.set_xlabel("threshold T")
    below.set_ylabel("layers that remain")
    below.yaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (above, below):
        axes.grid(alpha=0.6)
        axes.set_axisbelow(True)
    return figure
