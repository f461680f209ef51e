"""The model as it stands during a search: original layers, merged ones, and the hidden states that enter each.

Shapes: S samples, T padded tokens, D hidden size, N candidates that advance together.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from laco_train.collapse.decoder import Decoder
from laco_train.collapse.loss import CalibrationLoss
from laco_train.collapse.merge import merge_weights, merged_names
from laco_train.collapse.placement import OnDevice, Streamed
from laco_train.collapse.similarity import (
    CalibrationBatch,
    LayerCall,
    OriginalStates,
    fewer_copies,
    hidden_of,
    mean_cosine,
    original_states,
    recorded_calls,
    refuse_not_finite,
    states_to_come,
)
from laco_train.collapse.slots import Measured, Removal, Slot, Trial
from laco_train.collapse.windows import Likeness
from laco_train.settings import CollapseSettings

# Tokens that go through a layer at once on a GPU: enough to keep it busy, few enough to keep activations small.
_TOKENS_AT_ONCE = 4096
# Tokens of all trials that are under way: their hidden states stay on the device until they end.
_TOKENS_AHEAD = 16384


class Walk:
    """Slots of the standing model, the states that enter them, and what a trial would do to the final states.

    States before the slot at which a trial begins are those of the standing model, so a trial costs its merged layer
    and the slots after its window. Trials share one sweep: each layer is read once for all that run through it.

    Args:
        decoder: of the model in eval mode, on the device to search on; it is not changed.
        batch: calibration text.
        settings: merge rule and what it may merge.
        placement: where the weights lie; all of them on the device unless said otherwise.
    """

    def __init__(
        self,
        decoder: Decoder,
        batch: CalibrationBatch,
        settings: CollapseSettings,
        placement: OnDevice | Streamed | None = None,
    ):
        placement = placement or OnDevice()
        self.decoder = decoder
        self.batch = batch
        self.settings = settings
        self.placement = placement
        self.device = decoder.device
        self.mask = batch.mask.to(self.device)
        # looked up once: naming a layer's parameters takes as long as launching its kernels
        self._originals = [
            Slot(index, layer, dict(layer.named_parameters()), {}, index) for index, layer in enumerate(decoder.stack)
        ]
        self._names = [merged_names(layer, settings.merge_norms) for layer in decoder.stack]
        self._likeness = Likeness(decoder, settings)
        if isinstance(placement, OnDevice):
            self.original: OriginalStates = original_states(decoder, batch)
        else:
            first = self._originals[0]
            self.original = states_to_come(decoder, batch, lambda h, call: first.run(h, call, placement.weights(first)))
        self._calls: dict[int, list[LayerCall]] = {1: self.original.calls}
        self._known: dict[object, Measured] = {}
        self.reset()

    def reset(self) -> None:
        """Let the standing model be the original again; similarities found so far stay known."""
        self.entering: list[Tensor] = list(self.original.entering)
        self.slots = list(self._originals)

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
        return self._likeness.refusal([slot.origin for slot in self.slots[trial.at : trial.end]])

    def merged(self, trial: Trial) -> Slot:
        """The slot that the window of `trial` becomes."""
        window = self.slots[trial.at : trial.end]
        first = window[0]
        weights = [self.placement.weights(slot) for slot in window]
        tensors = merge_weights(self.settings.merge_rule, weights, self._names[first.origin])
        return dataclasses.replace(
            first, merged=tensors or first.merged, history=tuple(slot.history for slot in window)
        )

    def accept(self, trial: Trial | Removal, *, fitted: Mapping[str, Tensor] | None = None) -> None:
        """Let the standing model be what `trial` makes of it; states that enter slots after it are dropped.

        Args:
            trial: the window.
            fitted: weights of the layer that it becomes, by name, instead of what the merge rule gives.
        """
        if self._pending:  # else the first sweep would take the changed model for the original
            self.states()
        slots = [self._kept(self.merged(trial))] if isinstance(trial, Trial) else []
        if fitted is not None:
            slots = [dataclasses.replace(slot, merged=fitted, history=("fitted", slot.history)) for slot in slots]
        self.slots[trial.at : trial.end] = slots
        del self.entering[trial.at + 1 :]

    def _kept(self, slot: Slot) -> Slot:
        return dataclasses.replace(slot, merged=self.placement.put_away(slot.merged))

    def _run(self, slot: Slot, hidden: Tensor, call: LayerCall) -> Tensor:
        return hidden_of(slot.run(hidden, call, self.placement.overrides(slot)))

    @torch.no_grad()
    def states(self) -> list[Tensor]:
        """The states that enter every slot, computed from where they are known, and last those that leave the last."""
        for index in range(len(self.entering) - 1, len(self.slots)):
            self._step(index)
        self._settle()
        return list(self.entering)

    def _step(self, index: int) -> None:
        slot = self.slots[index]
        if index + 1 < len(self.slots):
            self.placement.expect(self.slots[index + 1])
        self.entering.append(self._run(slot, self.entering[index], self.original.calls[slot.origin]))

    def _settle(self) -> None:
        # the first sweep of a streamed model has just found the original's states
        if self._pending:
            entering, final = self.entering[: len(self.slots)], self._final(self.entering[-1])
            refuse_not_finite(self.decoder, self.batch, final)
            self.original = dataclasses.replace(self.original, entering=entering, final=final)

    @property
    def _pending(self) -> bool:
        return len(self.original.entering) < self.decoder.depth

    def _final(self, hidden: Tensor) -> Tensor:
        return hidden if self.decoder.norm is None else self.decoder.norm(hidden)

    @cached_property
    def calibration_loss(self) -> CalibrationLoss:
        """Loss on the calibration text, from final states."""
        if self._pending:
            self.states()
        return CalibrationLoss(self.decoder, self.batch, self.original)

    @torch.no_grad()
    def last_states(self, trials: Sequence[Trial | Removal]) -> list[Tensor]:
        """States (S, T, D) that leave the last layer, before the final norm, of the models that `trials` would make.

        Trials are ordered by where their windows end, the first to end first.
        """
        ends = [trial.end for trial in trials]
        assert ends == sorted(ends)
        waiting = list(trials)
        live: list[Tensor] = []
        pending = self._pending
        for index in range(0 if pending else ends[0], len(self.slots) + 1):
            while waiting and waiting[0].end == index:
                live.append(self._first_step(waiting.pop(0)))
            if index < len(self.slots):
                if pending:
                    self._step(index)
                elif index + 1 < len(self.slots):
                    self.placement.expect(self.slots[index + 1])
                live = self._through(self.slots[index], live)
        self._settle()
        return live

    def _first_step(self, trial: Trial | Removal) -> Tensor:
        # a function of its own, so that one merged layer is gone before the next is made
        hidden = self.entering[trial.at]
        if isinstance(trial, Removal):
            return hidden
        first, slot = self.slots[trial.at], self.merged(trial)
        overrides = {**self.placement.overrides(first), **slot.merged}
        return hidden_of(slot.run(hidden, self.original.calls[slot.origin], overrides))

    def _measure(self, hidden: Tensor, losses: bool) -> Tensor:
        final = self._final(hidden)
        similarity = mean_cosine(final, self.original.final, self.mask)
        return torch.stack([similarity, self.calibration_loss(final)] if losses else [similarity])

    def _through(self, slot: Slot, live: list[Tensor]) -> list[Tensor]:
        size, samples = self.trials_at_once, self.batch.samples
        out: list[Tensor] = []
        for start in range(0, len(live), size):
            group = live[start : start + size]
            hidden = group[0] if len(group) == 1 else torch.cat(group)
            out += self._run(slot, hidden, self.calls(len(group))[slot.origin]).split(samples)
        return out

    def similarities(self, trials: Sequence[Trial]) -> list[float]:
        """Cosine of final states with the original's for each of `trials`, see `measure`."""
        return [measured.similarity for measured in self.measure(trials)]

    def losses(self, trials: Sequence[Trial | Removal]) -> list[float]:
        """Next-token loss on the calibration text, in nats per token, of each of `trials`, see `measure`.

        Raises:
            InputError: the model's loss can't be had from its final states, or the text has nothing to predict.
        """
        return [loss for measured in self.measure(trials, losses=True) if (loss := measured.loss) is not None]

    @torch.inference_mode()
    def measure(self, trials: Sequence[Trial | Removal], *, losses: bool = False) -> list[Measured]:
        """What each of `trials` would do; one wait for the device for each `trials_ahead` of them.

        What was found for the same trial of the same standing model is not computed again.
        """
        if losses:
            self.calibration_loss.refuse_inexact()
        standing = tuple(slot.history for slot in self.slots)
        fresh = [trial for trial in trials if (standing, trial, losses) not in self._known]
        fresh.sort(key=lambda trial: trial.end)
        for start in range(0, len(fresh), self.trials_ahead):
            group = fresh[start : start + self.trials_ahead]
            rows = torch.stack([self._measure(hidden, losses) for hidden in self.last_states(group)]).tolist()
            for trial, (similarity, *loss) in zip(group, rows, strict=True):
                self._known[standing, trial, losses] = Measured(similarity, loss[0] if losses else None)
        return [self._known[standing, trial, losses] for trial in trials]

    @torch.no_grad()
    def measure_standing(self, *, losses: bool) -> Measured:
        """The same of the standing model itself."""
        row = self._measure(self.states()[-1], losses).tolist()
        return Measured(row[0], row[1] if losses else None)
