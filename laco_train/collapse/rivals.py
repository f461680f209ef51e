"""Depth pruning from other papers, as baselines: each looks once at the hidden states between the original's layers.

They choose among all layers, so that C, L, H, I and T mean nothing to them, and reach the target exactly. Hidden states
are those of the residual stream, before the final norm. Shapes: S samples, T padded tokens, D hidden size.
"""

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from laco_train.collapse.choice import Choice, Fitted, OnCandidate, Tried
from laco_train.collapse.fit import fit_layer
from laco_train.collapse.merge import DROP, FITTED
from laco_train.collapse.plan import Candidate, Merge
from laco_train.collapse.slots import Removal, Trial
from laco_train.collapse.walk import Walk
from laco_train.errors import InputError
from laco_train.settings import CollapseSettings


def shortgpt(walk: Walk, settings: CollapseSettings, target: int | None, on_candidate: OnCandidate | None) -> Choice:
    """Remove the layers of least block influence (ShortGPT, arXiv 2403.03853, eq. 1).

    Block influence of a layer is 1 minus the cosine between a token's hidden states that enter and leave it, averaged
    over all tokens.
    """
    assert target is not None
    count = walk.decoder.depth - target
    return _without(walk, _lowest_windows(walk, 1, count, _influence, on_candidate))


def angular(walk: Walk, settings: CollapseSettings, target: int | None, on_candidate: OnCandidate | None) -> Choice:
    """Remove the block of n layers that turns the hidden state least (arXiv 2403.17887, eq. 5 to 7).

    The distance is arccos(cosine) / pi between the states that enter the block and leave it, at the last token of each
    sample (the last that is not padding) as in the paper, averaged over samples.
    """
    assert target is not None
    size = walk.decoder.depth - target
    return _without(walk, _lowest_windows(walk, size, 1, _angular_distance, on_candidate))


def tail(walk: Walk, settings: CollapseSettings, target: int | None, on_candidate: OnCandidate | None) -> Choice:
    """Remove the last n layers before the final one, whatever the text."""
    assert target is not None
    last = walk.decoder.depth - 1
    first = target - 1
    walk.accept(Removal(first, last))
    return Choice(DROP, removed=tuple(range(first, last)))


def streamline(walk: Walk, settings: CollapseSettings, target: int | None, on_candidate: OnCandidate | None) -> Choice:
    """Replace the block of n + 1 layers of highest cosine by one layer fitted to it (LLM-Streamline, arXiv 2403.19135).

    The cosine is that between a token's hidden states that enter and leave the block, averaged over all tokens. The
    layer starts as the block's first, and `fit_layer` trains it on the calibration text: give enough of it.
    """
    assert target is not None
    size = walk.decoder.depth - target + 1
    candidates = _lowest_windows(walk, size, 1, _negative_cosine, on_candidate, sign=-1)
    best = next(c.layer for c in candidates if c.accepted)
    began = time.perf_counter()
    weights, tokens = fit_layer(walk, best, size)
    seconds = time.perf_counter() - began
    walk.accept(Trial(best, size - 1), fitted=weights)
    similarity = walk.measure_standing(losses=False).similarity
    if not math.isfinite(similarity):
        raise InputError(
            "collapse.strategy", "streamline's fitted layer gives non-finite states; load the model in float32"
        )
    return Choice(
        FITTED,
        (Merge(best, size - 1, similarity),),
        candidates=candidates,
        fitted=Fitted(best, weights, tokens, seconds),
    )


Distance = Callable[[Tensor, Tensor, Tensor], Tensor]


def _lowest_windows(
    walk: Walk, size: int, count: int, distance: Distance, on_candidate: OnCandidate | None, *, sign: int = 1
) -> tuple[Candidate, ...]:
    """All windows of `size` layers, those `count` accepted whose states change least from entering to leaving.

    Args:
        distance: from (S, T, D) entering and leaving states and the (S, T) mask to a scalar.
        sign: what a distance is multiplied by to give the score.
    """
    began = time.perf_counter()
    states = walk.states()
    pairs = zip(states, states[size:], strict=False)
    values = torch.stack([distance(entering, leaving, walk.mask) for entering, leaving in pairs]).tolist()
    chosen = sorted(range(len(values)), key=lambda at: values[at])[:count]
    seconds = (time.perf_counter() - began) / len(values)
    tried = Tried(on_candidate)
    for at, value in enumerate(values):
        tried.note(Candidate(at, size - 1, None, at in chosen, seconds, score=sign * value))
    return tuple(tried)


def _without(walk: Walk, candidates: Sequence[Candidate]) -> Choice:
    """Remove the accepted windows; their indices are those of the original."""
    accepted = [c for c in candidates if c.accepted]
    for candidate in reversed(accepted):
        walk.accept(Removal(candidate.layer, candidate.layer + candidate.absorbed + 1))
    removed = tuple(at for c in accepted for at in range(c.layer, c.layer + c.absorbed + 1))
    return Choice(DROP, removed=removed, candidates=tuple(candidates))


def _influence(entering: Tensor, leaving: Tensor, mask: Tensor) -> Tensor:
    """1 minus the mean cosine of (S, T, D) states at the tokens that (S, T) `mask` counts."""
    return 1 + _negative_cosine(entering, leaving, mask)


def _negative_cosine(entering: Tensor, leaving: Tensor, mask: Tensor) -> Tensor:
    counted = mask.bool()
    return -cosine_similarity(entering[counted].float(), leaving[counted].float(), dim=-1).mean()


def _angular_distance(entering: Tensor, leaving: Tensor, mask: Tensor) -> Tensor:
    """Mean angle, in units of pi, of (S, T, D) states at each sample's last token."""
    samples = torch.arange(len(mask), device=mask.device)
    last = mask.sum(dim=1) - 1
    cosine = cosine_similarity(entering[samples, last].float(), leaving[samples, last].float(), dim=-1)
    return (cosine.clamp(-1, 1).arccos() / math.pi).mean()
