"""Layer Collapse, Algorithm 1 of arXiv 2402.11187, without copying the model, at a threshold or to a depth.

Why cached states are exact: the pointer l only falls and every merge so far lies at or above it, so the layers before l
are still the original's and the hidden states entering l never change. Trials further down are made ahead of the
decision where that is cheaper: until one is accepted, the standing model does not change.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from laco_train.checks import target_key
from laco_train.collapse.plan import Candidate
from laco_train.collapse.slots import Trial
from laco_train.collapse.walk import Walk
from laco_train.collapse.windows import refuse_unmergeable, what_helps
from laco_train.errors import InputError
from laco_train.settings import CollapseSettings

DEFAULT_THRESHOLD = 0.65  # the paper's T for Llama2-7B, quoted at second hand
OnCandidate = Callable[[Candidate], None]


@dataclass(frozen=True)
class Found:
    """What a search found: its candidates, in order, and the threshold that it ran at."""

    candidates: list[Candidate]
    threshold: float


def laco(walk: Walk, settings: CollapseSettings, target: int | None, on_candidate: OnCandidate | None) -> Found:
    """Algorithm 1 at T, or at the largest threshold whose plan is at most `target` layers deep.

    Depth is not monotone in T, so a bisection could miss it. Between T and the largest similarity that a run at T
    rejected no decision changes, so the next threshold to try is just below that; the first plan that is deep enough
    down belongs to the largest such threshold. All runs share what was computed.

    Raises:
        InputError: no window can merge, see `refuse_unmergeable`, or no threshold reaches `target`.
    """
    refuse_unmergeable(walk.decoder, [settings], target)
    threshold = settings.similarity_threshold
    if threshold is None:
        threshold = DEFAULT_THRESHOLD if target is None else 1.0
    shallowest = walk.decoder.depth
    while True:
        walk.reset()
        candidates = algorithm_1(walk, settings, threshold, target, on_candidate)
        shallowest = min(shallowest, len(walk.slots))
        if target is None or len(walk.slots) <= target:
            return Found(candidates, threshold)
        rejected = [c.similarity for c in candidates if not c.accepted and c.similarity is not None]
        below = [similarity for similarity in rejected if similarity <= threshold]
        if not below:
            helps = what_helps(c.skipped for c in candidates) or "raise C, lower I or L, or set collapse.strategy"
            raise InputError(
                target_key(settings),
                f"no threshold reaches {target} layers with C = {settings.layers_per_merge} and L = "
                f"{settings.lowest_layer}: the least is {shallowest}; {helps}",
            )
        threshold = math.nextafter(max(below), -math.inf)  # a merge is kept only strictly above T


def algorithm_1(
    walk: Walk, settings: CollapseSettings, threshold: float, target: int | None, on_candidate: OnCandidate | None
) -> list[Candidate]:
    """One run over `walk`, which is left at what was accepted, and the windows tried, in order.

    Args:
        threshold: T.
        target: where to end if `settings.exact`; else, and with None, the pointer's end alone ends it.
    """
    c = settings.layers_per_merge
    pointer = (settings.highest_layer or walk.decoder.depth) - c  # l, counted from 1
    candidates: list[Candidate] = []
    floor = target if settings.exact and target is not None else 1
    while pointer >= settings.lowest_layer and len(walk.slots) > floor:
        began = time.perf_counter()
        trials = _ahead(walk, settings, pointer, floor)
        refusals = [walk.refusal(trial) for trial in trials]
        tried = [trial for trial, refusal in zip(trials, refusals, strict=True) if refusal is None]
        similarities = dict(zip(tried, walk.similarities(tried), strict=True))
        seconds = (time.perf_counter() - began) / len(trials)
        for trial, refusal in zip(trials, refusals, strict=True):
            similarity = similarities.get(trial)
            if similarity is not None and not math.isfinite(similarity):
                similarity, refusal = None, "final hidden states are not finite"
            accepted = similarity is not None and similarity > threshold
            candidates.append(Candidate(trial.at, trial.absorbed, similarity, accepted, seconds, refusal))
            if on_candidate is not None:
                on_candidate(candidates[-1])
            if accepted:
                walk.accept(trial)
                pointer = min(pointer - settings.min_interval, len(walk.slots) - c)
                break
            pointer -= 1
    return candidates


def _ahead(walk: Walk, settings: CollapseSettings, pointer: int, floor: int) -> list[Trial]:
    """The next trials if each is rejected: one on a CPU, where work ahead of a decision may be lost, else many."""
    lowest = settings.lowest_layer if walk.trials_ahead > 1 else pointer
    most = min(settings.layers_per_merge - 1, len(walk.slots) - floor)
    pointers = range(pointer, lowest - 1, -1)
    return [Trial(at - 1, min(most, len(walk.slots) - at)) for at in pointers][: walk.trials_ahead]
