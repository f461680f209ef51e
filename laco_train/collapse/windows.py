"""Which windows of layers can't merge, told by shapes and types alone, so before anything is computed."""

from collections.abc import Iterable, Sequence

from laco_train.collapse.decoder import Decoder
from laco_train.collapse.merge import DROP
from laco_train.errors import InputError
from laco_train.settings import CollapseSettings

UNLIKE_SHAPES = "layers of unequal shapes"
UNLIKE_TYPES = "layers of unlike types"
_ANY_TYPES = "set collapse.mixed_types to first, or collapse.merge_rule to drop"
_ANY_SHAPES = "set collapse.merge_rule to drop"


class Likeness:
    """What layers of a model have in common.

    Args:
        decoder: its weights need not be at hand.
        settings: the merge rule, and what it may merge.
    """

    def __init__(self, decoder: Decoder, settings: CollapseSettings):
        self._all_merge = settings.merge_rule == DROP
        self._types_matter = settings.mixed_types == "skip"
        named = (layer.named_parameters() for layer in decoder.stack)
        self._shapes = [tuple((name, tuple(p.shape)) for name, p in layer) for layer in named]
        self._types = [decoder.layer_type(index) for index in range(decoder.depth)]

    def refusal(self, window: Sequence[int]) -> str | None:
        """Why the layers `window` (of the original, from 0) can't merge, or None."""
        if self._all_merge:
            return None
        if len({self._shapes[index] for index in window}) > 1:
            return UNLIKE_SHAPES
        if self._types_matter and len({self._types[index] for index in window}) > 1:
            return UNLIKE_TYPES
        return None


def refuse_unmergeable(decoder: Decoder, wanted: Sequence[CollapseSettings], target: int | None = None) -> None:
    """Refuse a search that could accept nothing, whatever it measured; the weights need not be at hand.

    Args:
        decoder: of the original.
        wanted: settings of Layer Collapse or of greedy; of several, all of one merge rule, one that works suffices.
        target: layers that may remain at most, if there is a target.

    Raises:
        InputError: the rule sums experts, which are not aligned; or every window joins layers that are unlike.
    """
    rule = wanted[0].merge_rule
    if decoder.family.experts and rule != DROP:
        raise InputError(
            "collapse.merge_rule",
            f"{rule} can't join experts, which are not aligned across layers of {decoder.family.name}; use drop",
        )
    likeness = Likeness(decoder, wanted[0])
    windows = {window for settings in wanted for window in _windows(settings, decoder.depth, target)}
    refusals = {likeness.refusal(window) for window in windows}
    if None in refusals:
        return
    every = f"every window of {' or '.join(map(str, sorted({len(window) for window in windows})))} layers"
    if UNLIKE_TYPES in refusals:
        raise InputError("collapse.mixed_types", f"{every} mixes layer types, so nothing could merge; {_ANY_TYPES}")
    raise InputError("collapse.merge_rule", f"{every} has unequal shapes, so nothing could merge; {_ANY_SHAPES}")


def skipped_at_first(decoder: Decoder, settings: CollapseSettings, target: int) -> str | None:
    """`what_helps` with windows of the original that Layer Collapse or greedy skips."""
    likeness = Likeness(decoder, settings)
    return what_helps(likeness.refusal(window) for window in _windows(settings, decoder.depth, target))


def _windows(settings: CollapseSettings, depth: int, target: int | None) -> list[range]:
    """The smallest windows that a search tries in a model of which nothing is merged yet; larger ones hold these."""
    c = 2 if settings.strategy == "greedy" else settings.layers_per_merge
    # Algorithm 1 starts at H - C, counted from 1, however few layers its first merge may absorb
    starts = range(settings.lowest_layer - 1, (settings.highest_layer or depth) - c)
    size = min(c, depth - target + 1) if settings.exact and target is not None else c
    return [range(at, at + size) for at in starts]


def what_helps(skipped: Iterable[str | None]) -> str | None:
    """What lets windows merge that were skipped for the reasons `skipped`; None if it was for none of these.

    Args:
        skipped: of each window; None where it was tried.
    """
    reasons = list(skipped)
    for reason, why, fix in (
        (UNLIKE_TYPES, "mix layer types", _ANY_TYPES),
        (UNLIKE_SHAPES, "have unequal shapes", _ANY_SHAPES),
    ):
        if reason in reasons:
            return f"{reasons.count(reason)} windows are skipped, as their layers {why}: {fix}"
    return None
