"""Measures of each arm over the share of the parameters that is removed."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from laco_train.study.curves import Run
from laco_train.study.measures import Spread, spread

ORIGINAL = "original"
"""What the model with all its layers is called, at ratio 0."""


@dataclass(frozen=True)
class Quantity:
    """What is measured of a run; all that is shown of it, in tables, figures and files, comes from here.

    Attributes:
        key: its name in files.
        title: in words, after "Loss" or "Perplexity".
        of: its value of a run, nats per token; None: it has none.
    """

    key: str
    title: str
    of: Callable[[Run], float | None]


def _before(run: Run) -> float:
    return run.points[0].loss


def _after(run: Run) -> float | None:
    trained = run.points[-1].tokens > run.points[0].tokens  # refinement is no training
    return run.points[-1].loss if trained else None


QUANTITIES = (Quantity("before", "before training", _before), Quantity("after", "after training", _after))


@dataclass(frozen=True)
class Level:
    """Runs of an arm at one ratio.

    Attributes:
        ratio: that the study asked for; 0 for the original.
        removed: share of all parameters that is gone.
        depth: layers that are left.
        parameters: that are left.
        values: by key of a quantity, over seeds; None where a seed has none.
    """

    ratio: float
    removed: float
    depth: int
    parameters: int
    values: dict[str, Spread | None]


@dataclass(frozen=True)
class Line:
    """An arm over ratios.

    Attributes:
        name: the arm's.
        levels: the smallest ratio first.
        is_collapsed: whether it is a collapsed model, not a shape of random weights.
    """

    name: str
    levels: tuple[Level, ...]
    is_collapsed: bool = True

    def at(self, ratio: float, key: str) -> Spread | None:
        """A quantity at a ratio; None if it is not known there."""
        return next((level.values[key] for level in self.levels if level.ratio == ratio), None)


@dataclass(frozen=True)
class OverRatios:
    """What a study over ratios found.

    Attributes:
        ratios: that have a run, the smallest first.
        lines: arms that were collapsed, and scratch, in the order given.
        original: the model with all its layers; None if it was neither run nor measured.
        tokens: that each run trained on; 0 for none.
    """

    ratios: tuple[float, ...]
    lines: tuple[Line, ...]
    original: Level | None
    tokens: int

    @property
    def quantities(self) -> list[Quantity]:
        """Those that some arm has."""
        return [q for q in QUANTITIES if any(level.values[q.key] for line in self.lines for level in line.levels)]

    def ranked(self, ratio: float, key: str) -> list[tuple[str, float]]:
        """(arm, mean) of a quantity of collapsed models at a ratio, the lowest first."""
        values = {line.name: line.at(ratio, key) for line in self.lines if line.is_collapsed}
        found = [(name, value.mean) for name, value in values.items() if value is not None]
        return sorted(found, key=lambda pair: pair[1])


def perplexity(loss: float) -> float:
    """exp(loss); infinite where no float holds it."""
    return math.exp(loss) if loss < 700 else math.inf


def over_ratios(runs: Sequence[Run]) -> OverRatios:
    """Measures of finished runs.

    Args:
        runs: those with a ratio, and the original where it was run; others are left out.
    """
    collapsed = [run for run in runs if run.ratio is not None]
    ratios = sorted({run.ratio for run in collapsed if run.ratio is not None})
    at = by_level(runs)
    lines = []
    for name in dict.fromkeys(run.line for run in collapsed):
        levels = tuple(_level(ratio, at[name, ratio]) for ratio in ratios if (name, ratio) in at)
        lines.append(Line(name, levels, any(run.is_collapsed for run in collapsed if run.line == name)))
    tokens = min((run.points[-1].tokens for run in collapsed), default=0)
    return OverRatios(tuple(ratios), tuple(lines), _original(runs, at.get((ORIGINAL, 0.0), [])), tokens)


def by_level(runs: Sequence[Run]) -> dict[tuple[str, float], list[Run]]:
    """Runs of each arm at each ratio, by (arm, ratio), and those of the original; others are left out."""
    found: dict[tuple[str, float], list[Run]] = {}
    for run in runs:
        if run.ratio is not None:
            found.setdefault((run.line, run.ratio), []).append(run)
        elif run.strategy == "none":
            found.setdefault((ORIGINAL, 0.0), []).append(run)
    return found


def _level(ratio: float, runs: Sequence[Run]) -> Level:
    first = runs[0]
    return Level(
        ratio=ratio,
        removed=1 - first.parameters / (first.source_parameters or first.parameters),
        depth=first.depth,
        parameters=first.parameters,
        values={q.key: _over_seeds([q.of(run) for run in runs]) for q in QUANTITIES},
    )


def _over_seeds(values: Sequence[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    return spread(known) if len(known) == len(values) else None


def _original(runs: Sequence[Run], own: Sequence[Run]) -> Level | None:
    if own:
        return _level(0.0, own)
    if measured := [run for run in runs if run.original is not None]:
        values = {**dict.fromkeys((q.key for q in QUANTITIES), None), "before": spread([measured[0].original or 0.0])}
        return Level(0.0, 0.0, measured[0].source_depth, measured[0].source_parameters or 0, values)
    return None
