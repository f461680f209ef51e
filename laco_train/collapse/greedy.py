"""Greedy choices: at each step the best of everything that could go next, by what it does to the whole model.

States before a trial are those of the standing model, so that a step costs the suffix of each trial; after a step only
the states behind the change are computed anew.
"""

import math
import time
from collections.abc import Sequence

from laco_train.checks import target_key
from laco_train.collapse.choice import Choice, OnCandidate, Tried
from laco_train.collapse.merge import DROP
from laco_train.collapse.plan import Candidate, Merge
from laco_train.collapse.search import DEFAULT_THRESHOLD
from laco_train.collapse.slots import Measured, Removal, Trial
from laco_train.collapse.walk import Walk
from laco_train.collapse.windows import refuse_unmergeable, what_helps
from laco_train.errors import InputError
from laco_train.settings import CollapseSettings

_NOT_FINITE = "final hidden states are not finite"


def greedy(walk: Walk, settings: CollapseSettings, target: int | None, on_candidate: OnCandidate | None) -> Choice:
    """Each step merges the best of all windows of 2 to C layers, until T is not met or the target is reached.

    Best is the highest similarity of final states, or with ``criterion: loss`` the lowest calibration loss. Windows lie
    where Algorithm 1 may put them: layers below L, and H and those above it, stay as they are.

    Raises:
        InputError: no window can merge, see `refuse_unmergeable`, or none is left before the target is reached; a loss
            is asked for that can't be had.
    """
    refuse_unmergeable(walk.decoder, [settings], target)
    by_loss = settings.criterion == "loss"
    threshold = None
    if target is None:
        threshold = DEFAULT_THRESHOLD if settings.similarity_threshold is None else settings.similarity_threshold
    tried, merges = Tried(on_candidate), []
    refusals: dict[Trial, str] = {}
    while target is None or len(walk.slots) > target:
        began = time.perf_counter()
        walk.states()
        trials = _windows(walk, settings, target)
        refusals = {trial: refusal for trial in trials if (refusal := walk.refusal(trial)) is not None}
        measurable = [trial for trial in trials if trial not in refusals]
        measured = walk.measure(measurable, losses=by_loss)
        found = {trial: value for trial, value in zip(measurable, measured, strict=True) if _finite(value)}
        best = max(found, key=lambda trial: _rank(found[trial], by_loss), default=None)
        if best is not None and threshold is not None and found[best].similarity <= threshold:
            best = None
        seconds = (time.perf_counter() - began) / max(1, len(trials))
        for trial in trials:
            value = found.get(trial)
            skipped = None if value else refusals.get(trial, _NOT_FINITE)
            similarity, loss = (value.similarity, value.loss) if value else (None, None)
            tried.note(Candidate(trial.at, trial.absorbed, similarity, trial == best, seconds, skipped, score=loss))
        if best is None:
            break
        merges.append(Merge(best.at, best.absorbed, found[best].similarity))
        walk.accept(best)
    if target is not None and len(walk.slots) > target:
        helps = what_helps(refusals.values()) or "raise C or H, lower L, or set another collapse.strategy"
        raise InputError(
            target_key(settings),
            f"greedy reaches no less than {len(walk.slots)} layers with C = {settings.layers_per_merge} and L = "
            f"{settings.lowest_layer}, not {target}; {helps}",
        )
    return Choice(settings.merge_rule, tuple(merges), candidates=tuple(tried), threshold=threshold)


def _windows(walk: Walk, settings: CollapseSettings, target: int | None) -> list[Trial]:
    depth, standing = walk.decoder.depth, len(walk.slots)
    above = depth - (settings.highest_layer or depth) + 1  # layer H, counted from 1, and those after it
    most = settings.layers_per_merge - 1
    if settings.exact and target is not None:
        most = min(most, standing - target)
    return [
        Trial(at, absorbed)
        for at in range(settings.lowest_layer - 1, standing)
        for absorbed in range(1, most + 1)
        if at + absorbed < standing - above
    ]


def _finite(measured: Measured) -> bool:
    return math.isfinite(measured.similarity) and (measured.loss is None or math.isfinite(measured.loss))


def _rank(measured: Measured, by_loss: bool) -> float:
    return -measured.loss if by_loss and measured.loss is not None else measured.similarity


def sleb(walk: Walk, settings: CollapseSettings, target: int | None, on_candidate: OnCandidate | None) -> Choice:
    """Remove the layer whose loss hurts the calibration loss least, and again, until the target is reached.

    SLEB (arXiv 2402.09025, Algorithm 1 with its third metric, the loss of the model as it then stands), on the
    calibration text instead of WikiText-2. Any layer may go.

    Raises:
        InputError: the loss can't be had, or is not finite whichever layer goes.
    """
    assert target is not None
    tried, removed = Tried(on_candidate), []
    while len(walk.slots) > target:
        began = time.perf_counter()
        walk.states()
        trials = [Removal(at, at + 1) for at in range(len(walk.slots))]
        losses = walk.losses(trials)
        best = _lowest(losses)
        seconds = (time.perf_counter() - began) / len(trials)
        for at, loss in enumerate(losses):
            score, skipped = (loss, None) if math.isfinite(loss) else (None, _NOT_FINITE)
            tried.note(Candidate(at, 0, None, at == best, seconds, skipped, score=score))
        removed.append(walk.slots[best].origin)
        walk.accept(trials[best])
    return Choice(DROP, removed=tuple(sorted(removed)), candidates=tuple(tried))


def _lowest(losses: Sequence[float]) -> int:
    finite = [index for index, loss in enumerate(losses) if math.isfinite(loss)]
    if not finite:
        raise InputError("collapse.strategy", "sleb finds no finite calibration loss; load the model in another dtype")
    return min(finite, key=lambda index: losses[index])
