"""Layer Collapse at many settings of C, L, H, I and T, and which of them to take."""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from laco_train.analysis.settings import SweepSettings, check_sweep
from laco_train.collapse.plan import Candidate
from laco_train.collapse.search import algorithm_1
from laco_train.collapse.slots import Measured
from laco_train.collapse.walk import Walk
from laco_train.collapse.windows import refuse_unmergeable
from laco_train.errors import InputError
from laco_train.settings import CollapseSettings

_LAYERS_PER_MERGE = (2, 3, 4)
_THRESHOLDS = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
# Layer Collapse at a threshold, and nothing that contradicts it
_PLAIN: dict[str, Any] = {
    "strategy": "laco",
    "criterion": "similarity",
    "target_depth": None,
    "target_ratio": None,
    "exact": False,
    "plan": None,
    "remove": None,
}

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Outcome:
    """What one setting leads to.

    Attributes:
        layers_per_merge: C.
        lowest_layer: L, counted from 1.
        highest_layer: H, counted from 1.
        min_interval: I.
        similarity_threshold: T.
        depth: layers that remain.
        similarity: cosine of final hidden states with the original's.
        loss: next-token loss on the calibration text, nats per token.
    """

    layers_per_merge: int
    lowest_layer: int
    highest_layer: int
    min_interval: int
    similarity_threshold: float
    depth: int
    similarity: float
    loss: float


@dataclass(frozen=True)
class Recommendation:
    """A setting, and why.

    Attributes:
        outcome: None where no setting merged anything.
        reason: in a sentence.
        options: what turns the recipe into that setting, on the command line.
    """

    outcome: Outcome | None
    reason: str
    options: tuple[str, ...] = ()


def sweep_grid(sweep: SweepSettings, base: CollapseSettings, depth: int) -> list[CollapseSettings]:
    """Every combination that fits a model of `depth` layers, those that share most trials next to each other.

    Args:
        sweep: the values.
        base: merge rule and whatever is not swept; its target, plan and strategy are left aside.
        depth: layers of the model.

    Raises:
        InputError: a value that does not fit the model, or no combination does.
    """
    check_sweep(sweep, depth)
    default_c = [c for c in _LAYERS_PER_MERGE if c < depth]
    combinations = itertools.product(
        _distinct(sweep.layers_per_merge or default_c),
        _distinct(sweep.lowest_layer or [base.lowest_layer]),
        _distinct(sweep.highest_layer or [base.highest_layer or depth]),
        _distinct(sweep.min_interval or [base.min_interval]),
        sorted(_distinct(sweep.similarity_thresholds or _THRESHOLDS), reverse=True),
    )
    grid = [
        dataclasses.replace(
            base,
            layers_per_merge=c,
            lowest_layer=low,
            highest_layer=high,
            min_interval=interval,
            similarity_threshold=threshold,
            **_PLAIN,
        )
        for c, low, high, interval, threshold in combinations
        if low <= high - c
    ]
    if not grid:
        raise InputError(
            "sweep.layers_per_merge", "every C leaves H - C below L, so nothing would be tried; lower C or L"
        )
    return grid


def _distinct(values: Iterable[Number]) -> list[Number]:
    return list(dict.fromkeys(values))


def run_sweep(
    walk: Walk, grid: Sequence[CollapseSettings], on_progress: Callable[[float], None] | None = None
) -> list[Outcome]:
    """Search at each setting of `grid`; a trial that several settings make is computed once.

    Args:
        walk: of the model, made with the merge rule of `grid`.
        grid: see `sweep_grid`.
        on_progress: called with the settings done so far, the one under way in part.

    Raises:
        InputError: no window of any C can merge, see `refuse_unmergeable`, or the model's loss can't be had.
    """
    refuse_unmergeable(walk.decoder, grid)
    walk.calibration_loss.refuse_inexact()
    known: dict[object, Measured] = {}
    outcomes: list[Outcome] = []
    for done, settings in enumerate(grid):
        assert settings.similarity_threshold is not None
        walk.reset()
        reporting = _reporting(settings, done, on_progress)
        algorithm_1(walk, settings, settings.similarity_threshold, None, reporting)
        standing = tuple(slot.history for slot in walk.slots)
        if standing not in known:
            known[standing] = walk.measure_standing(losses=True)
        outcomes.append(_outcome(settings, len(walk.slots), known[standing]))
        if on_progress is not None:
            on_progress(done + 1)
    walk.reset()
    return outcomes


def _reporting(
    settings: CollapseSettings, done: int, on_progress: Callable[[float], None] | None
) -> Callable[[Candidate], None]:
    assert settings.highest_layer is not None
    first = settings.highest_layer - settings.layers_per_merge - 1
    last = settings.lowest_layer - 1

    def on_candidate(candidate: Candidate) -> None:
        if on_progress is not None:
            on_progress(done + (first - candidate.layer) / (first - last + 1))

    return on_candidate


def _outcome(settings: CollapseSettings, depth: int, measured: Measured) -> Outcome:
    assert settings.highest_layer is not None
    assert settings.similarity_threshold is not None
    assert measured.loss is not None
    return Outcome(
        settings.layers_per_merge,
        settings.lowest_layer,
        settings.highest_layer,
        settings.min_interval,
        settings.similarity_threshold,
        depth,
        measured.similarity,
        measured.loss,
    )


def best_at_each_depth(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """For each depth that was reached the outcome of least finite loss, the deepest model first; ties: the first."""
    best: dict[int, Outcome] = {}
    for outcome in outcomes:
        if math.isfinite(outcome.loss) and (outcome.depth not in best or outcome.loss < best[outcome.depth].loss):
            best[outcome.depth] = outcome
    return [best[depth] for depth in sorted(best, reverse=True)]


def recommend(
    outcomes: Sequence[Outcome],
    base: CollapseSettings,
    *,
    source_depth: int,
    original_loss: float,
    allowed: float,
) -> Recommendation:
    """The setting that leaves the fewest layers while the calibration loss rises by at most `allowed` nats.

    If each costs more, the one that costs least for each layer that goes.

    Args:
        outcomes: of a sweep.
        base: the recipe's own settings.
        source_depth: layers of the original.
        original_loss: its calibration loss, nats per token.
        allowed: nats per token.
    """
    shallower = [outcome for outcome in best_at_each_depth(outcomes) if outcome.depth < source_depth]
    if not shallower:
        return Recommendation(None, "No setting accepted a merge: lower sweep.similarity_thresholds.")
    within = [outcome for outcome in shallower if outcome.loss - original_loss <= allowed]
    if within:
        chosen = min(within, key=lambda outcome: outcome.depth)
        why = f"the fewest layers of all settings that cost at most {allowed:.2f} nats per token"
    else:
        chosen = min(shallower, key=lambda outcome: (outcome.loss - original_loss) / (source_depth - outcome.depth))
        why = (
            f"every setting costs more than {allowed:.2f} nats per token; this one costs least for each layer that goes"
        )
    return Recommendation(
        chosen,
        f"{source_depth} to {chosen.depth} layers for {chosen.loss - original_loss:+.2f} nats of calibration loss "
        f"({original_loss:.2f} to {chosen.loss:.2f}, before any training): {why}.",
        _options(chosen, base, source_depth),
    )


def _options(chosen: Outcome, base: CollapseSettings, source_depth: int) -> tuple[str, ...]:
    names = ("layers_per_merge", "lowest_layer", "highest_layer", "min_interval", "similarity_threshold")
    wanted = {name: getattr(chosen, name) for name in names} | _PLAIN
    given = {**dataclasses.asdict(base), "highest_layer": base.highest_layer or source_depth}
    differing = [(name, value) for name, value in wanted.items() if given[name] != value]
    return tuple(
        f"--collapse.{name} {value if isinstance(value, str) else json.dumps(value)}" for name, value in differing
    )
