"""Layer Collapse, Algorithm 1 of arXiv 2402.11187, without copying the model.

Why cached states are exact: the pointer l only falls and every merge so far lies at or above it, so the layers before l
are still the original's and the hidden states entering l never change. A candidate therefore costs one merged layer
(a dict of tensors, not a module) and a run of the layers from l on.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from laco_train.collapse.decoder import Decoder
from laco_train.collapse.merge import DROP, merge_weights, merged_names
from laco_train.collapse.plan import Candidate
from laco_train.collapse.similarity import (
    CalibrationBatch,
    LayerCall,
    OriginalStates,
    hidden_of,
    mean_cosine,
    original_states,
)
from laco_train.errors import InputError
from laco_train.settings import CollapseSettings


@dataclass(frozen=True)
class Slot:
    """A layer of the model as it stands in the search: an original layer, with merged weights in place of some.

    Attributes:
        origin: index of the original layer that runs it.
        layer: its module.
        call: how the model calls it.
        merged: parameters that an accepted merge replaced.
    """

    origin: int
    layer: nn.Module
    call: LayerCall
    merged: Mapping[str, Tensor]

    def run(self, hidden: Tensor) -> Tensor:
        """Map (S, T, D) hidden states through the layer."""
        output = functional_call(self.layer, dict(self.merged), (hidden, *self.call.args), self.call.kwargs)
        return hidden_of(output)

    def weights(self) -> dict[str, Tensor]:
        """Its parameters by name, merged ones included."""
        return {**dict(self.layer.named_parameters()), **self.merged}


class LayerWalk:
    """The model as it stands during a search: slots, the original's states, and the similarity of a candidate."""

    def __init__(self, decoder: Decoder, batch: CalibrationBatch, settings: CollapseSettings):
        self.decoder = decoder
        self.settings = settings
        self.mask = batch.mask.to(next(decoder.model.parameters()).device)
        self.states: OriginalStates = original_states(decoder, batch)
        self.slots = [Slot(i, layer, self.states.calls[i], {}) for i, layer in enumerate(decoder.stack)]

    def refusal(self, window: Sequence[Slot]) -> str | None:
        """Why the layers of `window` can't merge, or None."""
        if self.settings.merge_rule == DROP:
            return None
        shapes = [{name: tuple(value.shape) for name, value in slot.weights().items()} for slot in window]
        if any(shape != shapes[0] for shape in shapes):
            return "layers of unequal shapes"
        if self.settings.mixed_types == "skip" and len({self.decoder.layer_type(slot.origin) for slot in window}) > 1:
            return "layers of unlike types"
        return None

    def merged(self, window: Sequence[Slot]) -> Slot:
        """The slot that the layers of `window` become."""
        first = window[0]
        names = merged_names(first.layer, self.settings.merge_norms)
        tensors = merge_weights(self.settings.merge_rule, [slot.weights() for slot in window], names)
        return Slot(first.origin, first.layer, first.call, tensors or first.merged)

    def similarity(self, start: int, suffix: Sequence[Slot]) -> float:
        """Cosine of final states with the original's when `suffix` follows the original's first `start` layers."""
        hidden = self.states.entering[start]
        for slot in suffix:
            hidden = slot.run(hidden)
        final = hidden if self.decoder.norm is None else self.decoder.norm(hidden)
        return float(mean_cosine(final, self.states.final, self.mask))


@torch.no_grad()
def layer_collapse(
    decoder: Decoder,
    batch: CalibrationBatch,
    settings: CollapseSettings,
    on_candidate: Callable[[Candidate], None] | None = None,
) -> list[Candidate]:
    """Every candidate of Algorithm 1 in order; the accepted ones are the merges.

    Args:
        decoder: of the model in eval mode, on the device to search on; it is not changed.
        batch: calibration text.
        settings: C, L, H, I, T and the merge rule; checked against the depth by the caller.
        on_candidate: called after each candidate.

    Raises:
        InputError: the merge rule can't be used on this family, or every window was skipped.
    """
    if decoder.family.experts and settings.merge_rule != DROP:
        raise InputError(
            "collapse.merge_rule",
            f"{settings.merge_rule} can't join experts, which are not aligned across layers of {decoder.family.name}; "
            "use drop",
        )
    walk = LayerWalk(decoder, batch, settings)
    c = settings.layers_per_merge
    pointer = (settings.highest_layer or decoder.depth) - c  # l, counted from 1
    candidates: list[Candidate] = []
    while pointer >= settings.lowest_layer:
        began = time.perf_counter()
        at = pointer - 1
        absorbed = min(c - 1, len(walk.slots) - pointer)
        window = walk.slots[at : at + absorbed + 1]
        refusal = walk.refusal(window)
        similarity: float | None = None
        accepted = False
        if refusal is None:
            slot = walk.merged(window)
            tail = [slot, *walk.slots[at + absorbed + 1 :]]
            similarity = walk.similarity(at, tail)
            if not math.isfinite(similarity):
                similarity, refusal = None, "final hidden states are not finite"
            accepted = similarity is not None and similarity > settings.similarity_threshold
            if accepted:
                walk.slots[at:] = tail
        seconds = time.perf_counter() - began
        candidates.append(Candidate(at, absorbed, similarity, accepted, seconds, refusal))
        if on_candidate is not None:
            on_candidate(candidates[-1])
        pointer = min(pointer - settings.min_interval, len(walk.slots) - c) if accepted else pointer - 1
    if candidates and all(candidate.skipped for candidate in candidates):
        raise InputError(
            "collapse.mixed_types",
            f"every window of {c} layers mixes layer types, so all were skipped; "
            "set collapse.mixed_types to first, or collapse.merge_rule to drop",
        )
    return candidates
