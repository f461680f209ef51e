"""Next-token loss on the calibration text, from final hidden states, through the model's own head.

Shapes: S samples, T padded tokens, D hidden size, V vocabulary.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from laco_train.collapse.decoder import Decoder
from laco_train.collapse.similarity import CalibrationBatch, OriginalStates
from laco_train.errors import InputError

# Tokens whose logits exist at once: 4,096 of a vocabulary of 50,000 are 0.8 GB in float32.
_TOKENS_AT_ONCE = 4096
_IGNORED = -100


class CalibrationLoss:
    """Mean next-token loss, nats per token, of final hidden states on the calibration batch; padding never counts.

    The model computes the logits itself, from states that it is handed in place of those of its layers, so that
    whatever a family does to them (soft-capping, scaling) is done here too.

    Args:
        decoder: of the model.
        batch: calibration text.
        original: the model's own states on it.
    """

    def __init__(self, decoder: Decoder, batch: CalibrationBatch, original: OriginalStates):
        self._model = decoder.model
        self._body = decoder.model.get_submodule(decoder.family.stack.rpartition(".")[0])
        self._original = original
        device = original.final.device
        self._input_ids = batch.input_ids.to(device)
        self._mask = batch.mask.to(device)
        self._labels = self._input_ids.masked_fill(self._mask == 0, _IGNORED)

    @torch.no_grad()
    def __call__(self, final: Tensor) -> Tensor:
        """Loss of (S, T, D) states after the final norm, as a float32 scalar on their device."""
        step = max(1, _TOKENS_AT_ONCE // self._labels.shape[1])
        rows = [slice(start, start + step) for start in range(0, len(self._labels), step)]
        total = torch.stack([self._sum(final, part) for part in rows]).sum()
        return total / (self._labels[:, 1:] != _IGNORED).sum()

    def _sum(self, final: Tensor, rows: slice) -> Tensor:
        logits = self._head(final, rows)[0]
        # (S, T, V) against the token that follows each
        return cross_entropy(logits[:, :-1].float().flatten(0, 1), self._labels[rows, 1:].flatten(), reduction="sum")

    def _head(self, final: Tensor, rows: slice, **more: Tensor) -> Any:
        with _returning(self._body, self._original.output, final[rows]):
            return self._model(
                input_ids=self._input_ids[rows], attention_mask=self._mask[rows], use_cache=False, **more
            )

    @cached_property
    def of_original(self) -> float | None:
        """The original's loss; None if the text predicts no token, or the model's head can't be run alone."""
        if not bool((self._labels[:, 1:] != _IGNORED).any()):
            return None
        try:
            return self(self._original.final).item()
        except _Bypassed:
            return None

    def refuse_inexact(self) -> None:
        """InputError unless this is what the model gives for its loss, checked on the longest sample the first time."""
        if self._problem is not None:
            raise self._problem

    @cached_property
    @torch.no_grad()
    def _problem(self) -> InputError | None:
        kind = self._model.config.model_type
        if self.of_original is None:
            if self._mask.sum(dim=1).max() < 2:
                return InputError("collapse.calibration", "no sample has two tokens, so none is predicted; add text")
            return InputError("model.source", f"{kind} computes its logits from more than final states: no loss")
        longest = int(self._mask.sum(dim=1).argmax())
        row = slice(longest, longest + 1)
        found = self._sum(self._original.final, row) / (self._labels[row, 1:] != _IGNORED).sum()
        expected = self._head(self._original.final, row, labels=self._labels[row]).loss
        # in half precision a model may round its loss
        within = 1e-4 if self._original.final.dtype == torch.float32 else 2e-2
        off = (found - expected).abs().item()
        if not off <= within * max(1.0, expected.item()):
            return InputError("model.source", f"the loss of {kind} is more than that of the next token (by {off:.1e})")
        return None


class _Bypassed(Exception):
    """The model did not call the module whose output was to be replaced."""


@contextmanager
def _returning(body: nn.Module, output: Any, final: Tensor) -> Iterator[None]:
    """For the time of the block `body` returns `output` with `final` for its hidden states, without running."""
    replaced = (
        (final, *output[1:]) if isinstance(output, tuple) else dataclasses.replace(output, last_hidden_state=final)
    )
    own, called = body.__dict__.get("forward"), []

    def forward(*args: Any, **kwargs: Any) -> Any:
        called.append(True)
        return replaced

    body.forward = forward
    try:
        yield
    finally:
        if own is None:
            del body.forward
        else:
            body.forward = own
    if not called:
        raise _Bypassed
