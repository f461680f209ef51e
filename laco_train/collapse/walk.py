"""The model as it stands during a search: original layers, merged ones, and the hidden states that enter each.

Shapes: S samples, T padded tokens, D hidden size, N candidates that advance together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from laco_train.collapse.decoder import Decoder
from laco_train.collapse.merge import DROP, merge_weights, merged_names
from laco_train.collapse.similarity import (
    CalibrationBatch,
    LayerCall,
    OriginalStates,
    fewer_copies,
    hidden_of,
    mean_cosine,
    original_states,
    recorded_calls,
)
from laco_train.settings import CollapseSettings

# Tokens that go through a layer at once on a GPU: enough to keep it busy, few enough to keep activations small.
_TOKENS_AT_ONCE = 4096
# Tokens of all trials that are under way: their hidden states stay on the device until they end.
_TOKENS_AHEAD = 16384


@dataclass(frozen=True)
class Slot:
    """A layer of the model as it stands in the search: an original layer, with merged weights in place of some.

    Attributes:
        origin: index of the original layer that runs it.
        layer: its module.
        merged: parameters that an accepted merge replaced.
        history: what went into it: an original index, or the histories of the slots that merged.
    """

    origin: int
    layer: nn.Module
    merged: Mapping[str, Tensor]
    history: object

    def run(self, hidden: Tensor, call: LayerCall) -> Tensor:
        """Map (S, T, D) hidden states through the layer."""
        if not self.merged:
            return hidden_of(self.layer(hidden, *call.args, **call.kwargs))
        return hidden_of(functional_call(self.layer, dict(self.merged), (hidden, *call.args), call.kwargs))

    def weights(self) -> dict[str, Tensor]:
        """Its parameters by name, merged ones included."""
        return {**dict(self.layer.named_parameters()), **self.merged}


@dataclass(frozen=True)
class Trial:
    """A window of the standing model that would become its first layer.

    Attributes:
        at: index of the window's first slot.
        absorbed: number of slots after it that would go.
    """

    at: int
    absorbed: int


class Walk:
    """Slots of the standing model, the states that enter them, and what a trial would do to the final states.

    States before the slot at which a trial begins are those of the standing model, so a trial costs its merged layer
    and the slots after its window. Trials share one sweep: each layer is read once for all that run through it.

    Args:
        decoder: of the model in eval mode, on the device to search on; it is not changed.
        batch: calibration text.
        settings: merge rule and what it may merge.
    """

    def __init__(self, decoder: Decoder, batch: CalibrationBatch, settings: CollapseSettings):
        self.decoder = decoder
        self.batch = batch
        self.settings = settings
        self.device = next(decoder.model.parameters()).device
        self.mask = batch.mask.to(self.device)
        self.original: OriginalStates = original_states(decoder, batch)
        self._calls: dict[int, list[LayerCall]] = {1: self.original.calls}
        self._known: dict[object, float] = {}
        self.reset()

    def reset(self) -> None:
        """Let the standing model be the original again; similarities found so far stay known."""
        self.entering: list[Tensor] = list(self.original.entering)
        self.slots = [Slot(index, layer, {}, index) for index, layer in enumerate(self.decoder.stack)]

    @property
    def trials_at_once(self) -> int:
        """How many trials one layer call takes: on a CPU one, as arithmetic is all that counts there."""
        if self.device.type == "cpu":
            return 1
        return max(1, _TOKENS_AT_ONCE // self.mask.numel())

    @property
    def trials_ahead(self) -> int:
        """How many trials may be made before the first is decided: on a CPU one, else what little memory allows."""
        return 1 if self.device.type == "cpu" else max(1, _TOKENS_AHEAD // self.mask.numel())

    def calls(self, copies: int) -> list[LayerCall]:
        """How the model calls each original layer for `copies` of the calibration batch, one after the other."""
        if copies not in self._calls:
            most = self.trials_at_once
            if most not in self._calls:
                tuples = self.original.tuple_outputs
                self._calls[most] = recorded_calls(self.decoder, self.batch, most, tuple_outputs=tuples)
            self._calls[copies] = [
                fewer_copies(one, many, copies) for one, many in zip(self._calls[1], self._calls[most], strict=True)
            ]
        return self._calls[copies]

    def refusal(self, trial: Trial) -> str | None:
        """Why the window of `trial` can't merge, or None."""
        if self.settings.merge_rule == DROP:
            return None
        window = self.slots[trial.at : trial.at + trial.absorbed + 1]
        shapes = [{name: tuple(value.shape) for name, value in slot.weights().items()} for slot in window]
        if any(shape != shapes[0] for shape in shapes):
            return "layers of unequal shapes"
        if self.settings.mixed_types == "skip" and len({self.decoder.layer_type(slot.origin) for slot in window}) > 1:
            return "layers of unlike types"
        return None

    def merged(self, trial: Trial) -> Slot:
        """The slot that the window of `trial` becomes."""
        window = self.slots[trial.at : trial.at + trial.absorbed + 1]
        first = window[0]
        names = merged_names(first.layer, self.settings.merge_norms)
        tensors = merge_weights(self.settings.merge_rule, [slot.weights() for slot in window], names)
        return Slot(first.origin, first.layer, tensors or first.merged, tuple(slot.history for slot in window))

    def accept(self, trial: Trial) -> None:
        """Let the standing model be what `trial` makes of it; states that enter slots after it are dropped."""
        self.slots[trial.at : trial.at + trial.absorbed + 1] = [self.merged(trial)]
        del self.entering[trial.at + 1 :]

    @torch.no_grad()
    def advance(self) -> None:
        """Compute the states that enter every slot of the standing model, from where they are known."""
        while len(self.entering) < len(self.slots):
            slot = self.slots[len(self.entering) - 1]
            self.entering.append(slot.run(self.entering[-1], self.original.calls[slot.origin]))

    @torch.no_grad()
    def last_states(self, trials: Sequence[Trial]) -> list[Tensor]:
        """States (S, T, D) that leave the last layer, before the final norm, of the models that `trials` would make.

        Trials are ordered by where their windows end, the first to end first.
        """
        ends = [trial.at + trial.absorbed + 1 for trial in trials]
        assert ends == sorted(ends)
        waiting = list(zip(ends, trials, strict=True))
        live: list[Tensor] = []
        for index in range(ends[0], len(self.slots) + 1):
            while waiting and waiting[0][0] == index:
                live.append(self._first_step(waiting.pop(0)[1]))
            if index < len(self.slots):
                live = self._through(self.slots[index], live)
        return live

    def _first_step(self, trial: Trial) -> Tensor:
        # a function of its own, so that one merged layer is gone before the next is made
        slot = self.merged(trial)
        return slot.run(self.entering[trial.at], self.original.calls[slot.origin])

    def _similarity(self, hidden: Tensor) -> Tensor:
        final = hidden if self.decoder.norm is None else self.decoder.norm(hidden)
        return mean_cosine(final, self.original.final, self.mask)

    def _through(self, slot: Slot, live: list[Tensor]) -> list[Tensor]:
        size, samples = self.trials_at_once, self.batch.samples
        out: list[Tensor] = []
        for start in range(0, len(live), size):
            group = live[start : start + size]
            hidden = group[0] if len(group) == 1 else torch.cat(group)
            out += slot.run(hidden, self.calls(len(group))[slot.origin]).split(samples)
        return out

    def similarities(self, trials: Sequence[Trial]) -> list[float]:
        """Cosine of final states with the original's for each of `trials`; one wait for the device for all of them.

        What was found for the same trial of the same standing model is not computed again.
        """
        standing = tuple(slot.history for slot in self.slots)
        fresh = [trial for trial in trials if (standing, trial) not in self._known]
        fresh.sort(key=lambda trial: trial.at + trial.absorbed)
        if fresh:
            with torch.no_grad():
                values = torch.stack([self._similarity(hidden) for hidden in self.last_states(fresh)]).tolist()
            self._known.update({(standing, trial): value for trial, value in zip(fresh, values, strict=True)})
        return [self._known[standing, trial] for trial in trials]
