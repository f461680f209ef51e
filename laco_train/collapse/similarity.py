"""From calibration text to hidden states to a cosine.

Shapes: S samples, T padded tokens, D hidden size.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from laco_train.collapse.decoder import Decoder
from laco_train.errors import InputError
from laco_train.recipes import find


@dataclass(frozen=True)
class CalibrationBatch:
    """Calibration text as one right-padded batch.

    Attributes:
        input_ids: (S, T) token ids.
        mask: (S, T), 1 where a token counts.
        sha256: of the samples' text, joined by newlines.
    """

    input_ids: Tensor
    mask: Tensor
    sha256: str

    @property
    def samples(self) -> int:
        """Number of samples."""
        return self.input_ids.shape[0]

    @property
    def tokens(self) -> int:
        """Number of tokens, padding aside."""
        return int(self.mask.sum())


@dataclass(frozen=True)
class LayerCall:
    """What the model passes to one decoder layer beside the hidden states: masks, positions, no cache."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class OriginalStates:
    """The uncollapsed model's states on the calibration batch.

    Attributes:
        entering: for each layer, the (S, T, D) hidden states that enter it.
        calls: for each layer, how the model calls it.
        final: (S, T, D), after the final norm.
        tuple_outputs: whether a layer returns its hidden states in a tuple.
        output: what the model without its head returned; it starts with `final`.
    """

    entering: list[Tensor]
    calls: list[LayerCall]
    final: Tensor
    tuple_outputs: bool
    output: Any


def read_calibration(calibration: str | Sequence[str]) -> list[str]:
    """The samples: the lines of a text file that are not blank, or the list itself."""
    if isinstance(calibration, str):
        path = find("data", calibration)
        if path is None:
            raise InputError("collapse.calibration", f"no file {calibration!r}; name a file with one sample a line")
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            raise InputError("collapse.calibration", f"{path} is not UTF-8 text") from None
    else:
        lines = list(calibration)
    samples = [line.strip() for line in lines if line.strip()]
    if not samples:
        raise InputError("collapse.calibration", f"{calibration!r} holds no text; give one sample a line")
    return samples


def calibration_batch(tokenizer: PreTrainedTokenizerBase, samples: Sequence[str]) -> CalibrationBatch:
    """Tokenise `samples` as the model's users would, and pad on the right, so that real tokens never see padding."""
    ids = [tokenizer(sample)["input_ids"] for sample in samples]
    if not all(ids):
        raise InputError("collapse.calibration", "a sample has no tokens; remove it")
    width = max(len(row) for row in ids)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    input_ids = torch.tensor([row + [pad] * (width - len(row)) for row in ids])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids])
    digest = hashlib.sha256("\n".join(samples).encode()).hexdigest()
    return CalibrationBatch(input_ids, mask, digest)


def hidden_of(output: Any) -> Tensor:
    """The hidden states in a decoder layer's output, which is a tensor or a tuple that starts with it."""
    return output[0] if isinstance(output, tuple) else output


def _inputs(decoder: Decoder, batch: CalibrationBatch, copies: int) -> dict[str, Any]:
    """Arguments of the model without its head for `copies` of the batch, one after the other.

    Raises:
        InputError: a sample is longer than the model's table of positions.
    """
    positions, longest = _learned_positions(decoder), batch.input_ids.shape[1]
    if positions is not None and longest > positions:
        raise InputError(
            "collapse.calibration",
            f"has a sample of {longest} tokens, more than the model's {positions} positions; split it",
        )
    embeddings = next(decoder.model.get_input_embeddings().parameters()).shape[0]
    # a pad token that was added to the tokenizer alone has no embedding; any other will do, as it is masked
    known = batch.mask.bool() | (batch.input_ids < embeddings)
    return {
        "input_ids": batch.input_ids.where(known, 0).repeat(copies, 1).to(decoder.device),
        "attention_mask": batch.mask.repeat(copies, 1).to(decoder.device),
        "use_cache": False,
    }


def _learned_positions(decoder: Decoder) -> int | None:
    """Length of the table that positions are looked up in; None where they are computed and so have no end."""
    limit = getattr(decoder.config, "max_position_embeddings", None)
    tokens = decoder.model.get_input_embeddings()
    tables = [m for m in decoder.model.modules() if isinstance(m, nn.Embedding) and m is not tokens]
    # OPT's has two more rows, which no token gets
    return limit if limit is not None and any(0 <= m.num_embeddings - limit <= 2 for m in tables) else None


def _refuse_reshaped(decoder: Decoder, batch: CalibrationBatch, *states: Tensor) -> None:
    shapes = [tuple(each.shape) for each in states]
    if any(len(shape) != 3 or shape[:2] != tuple(batch.mask.shape) or shape != shapes[0] for shape in shapes):
        raise InputError(
            "model.source",
            f"{decoder.config.model_type} does not hand on one state a token from layer to layer (shapes "
            f"{', '.join(map(str, shapes))} for {tuple(batch.mask.shape)} tokens); use a family that the README lists",
        )


def refuse_not_finite(decoder: Decoder, batch: CalibrationBatch, final: Tensor) -> None:
    """InputError if the original's (S, T, D) `final` states are not all numbers, so that no cosine could be had."""
    if not bool(torch.isfinite(final[batch.mask.bool()]).all()):
        dtype = str(final.dtype).removeprefix("torch.")
        raise InputError(
            "model.source",
            f"its final hidden states on the calibration text are not finite in {dtype}; set model.dtype: float32, or "
            "if they are not even then, replace the weights: they are damaged",
        )


@contextmanager
def _recording(decoder: Decoder) -> Iterator[tuple[list[Tensor], list[LayerCall]]]:
    entering: list[Tensor] = []
    calls: list[LayerCall] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = dict(kwargs)
        hidden = args[0] if args else rest.pop("hidden_states")
        entering.append(hidden)
        calls.append(LayerCall(args[1:], rest))

    handles = [layer.register_forward_pre_hook(record, with_kwargs=True) for layer in decoder.stack]
    try:
        yield entering, calls
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def original_states(decoder: Decoder, batch: CalibrationBatch) -> OriginalStates:
    """One forward pass of the model as it is, keeping what enters each layer and how each is called.

    Raises:
        InputError: if norm(last layer) is not the model's final hidden state, so that walking the layers by hand would
            compute another function than the model does; if that state is not finite; if a sample is too long.
    """
    model = decoder.model
    with _recording(decoder) as (entering, calls):
        output = model.base_model(**_inputs(decoder, batch, 1))
    final = output[0]
    if len(calls) != decoder.depth:
        raise InputError("model.source", f"{model.config.model_type} did not call each of its layers once")
    last = decoder.stack[-1](entering[-1], *calls[-1].args, **calls[-1].kwargs)
    hidden = hidden_of(last)
    walked = hidden if decoder.norm is None else decoder.norm(hidden)
    _refuse_reshaped(decoder, batch, walked, final)
    refuse_not_finite(decoder, batch, final)
    counted = batch.mask.bool()
    if not torch.equal(walked[counted], final[counted]):
        worst = (walked - final)[counted].abs().max().item()
        # the same arithmetic twice: only rounding may differ, where a device does not repeat itself
        within = 1e-5 if final.dtype == torch.float32 else 1e-2
        if not worst <= within * final[counted].abs().max().item():
            kind = model.config.model_type
            raise InputError("model.source", f"{kind} does more after its last layer than a norm (off by {worst:.1e})")
    return OriginalStates(entering, calls, final, tuple_outputs=isinstance(last, tuple), output=output)


@torch.no_grad()
def states_to_come(
    decoder: Decoder, batch: CalibrationBatch, run_first: Callable[[Tensor, LayerCall], Any]
) -> OriginalStates:
    """What can be known before any layer but the first has run: how each is called, and what enters the first.

    For a model whose layers are brought in one at a time; the first sweep finds the rest.

    Args:
        run_first: output of the first layer, for the states that enter it and its call.

    Raises:
        InputError: the model does more after its layers than a norm, or a sample is too long.
    """
    model = decoder.model
    calls, hidden, _ = _bypassed(decoder, batch, 1, tuple_outputs=False, layers=1)
    _refuse_reshaped(decoder, batch, hidden)
    tuple_outputs = isinstance(run_first(hidden, calls[0]), tuple)
    calls, hidden, output = _bypassed(decoder, batch, 1, tuple_outputs=tuple_outputs, layers=None)
    final = hidden if decoder.norm is None else decoder.norm(hidden)
    if not torch.equal(final, output[0]):
        raise InputError("model.source", f"{model.config.model_type} does more after its last layer than a norm")
    return OriginalStates([hidden], calls, final, tuple_outputs=tuple_outputs, output=output)


class _Recorded(Exception):
    """Ends a forward pass once what was asked for is known."""


def recorded_calls(decoder: Decoder, batch: CalibrationBatch, copies: int, *, tuple_outputs: bool) -> list[LayerCall]:
    """How the model calls each layer for `copies` of the batch, one after the other, without running the layers.

    The model itself makes masks and positions, so nothing is assumed about which of them have a batch dimension.
    """
    return _bypassed(decoder, batch, copies, tuple_outputs=tuple_outputs, layers=None)[0]


@torch.no_grad()
def _bypassed(
    decoder: Decoder, batch: CalibrationBatch, copies: int, *, tuple_outputs: bool, layers: int | None
) -> tuple[list[LayerCall], Tensor, Any]:
    """A pass in which every layer hands on what it gets: the calls, what entered the first layer, the body's output.

    Args:
        layers: end after so many layers, without an output; None: pass them all.
    """
    inputs = _inputs(decoder, batch, copies)
    calls: list[LayerCall] = []
    entered: list[Tensor] = []
    output: Any = None
    own = [layer.__dict__.get("forward") for layer in decoder.stack]

    def forward(*args: Any, **kwargs: Any) -> Any:
        rest = dict(kwargs)
        hidden = args[0] if args else rest.pop("hidden_states")
        entered.append(hidden)
        calls.append(LayerCall(args[1:], rest))
        if len(calls) == layers:
            raise _Recorded
        return (hidden,) if tuple_outputs else hidden

    for layer in decoder.stack:
        layer.forward = forward
    try:
        output = decoder.model.base_model(**inputs)
    except _Recorded:
        pass
    finally:
        for layer, before in zip(decoder.stack, own, strict=True):
            if before is None:
                del layer.forward
            else:
                layer.forward = before
    return calls, entered[0], output


def fewer_copies(one: LayerCall, many: LayerCall, copies: int) -> LayerCall:
    """The call for `copies` of the batch, cut from that for `many`: what grows with the number of copies is cut."""

    def cut(single: Any, multiple: Any) -> Any:
        if isinstance(single, Tensor) and single.shape[:1] != multiple.shape[:1]:
            return multiple[: copies * single.shape[0]]
        if isinstance(single, tuple):
            return tuple(cut(a, b) for a, b in zip(single, multiple, strict=True))
        return multiple

    args = tuple(cut(a, b) for a, b in zip(one.args, many.args, strict=True))
    return LayerCall(args, {name: cut(value, many.kwargs[name]) for name, value in one.kwargs.items()})


def mean_cosine(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """Cosine of each sample's flattened hidden states, padding left out, averaged over samples (published code).

    Args:
        a: (S, T, D).
        b: (S, T, D).
        mask: (S, T), 1 where a token counts.

    Returns:
        A float32 scalar tensor on the device of `a`.
    """
    weight = mask.to(a.device).unsqueeze(-1)
    x = (a.float() * weight).flatten(1)
    y = (b.float() * weight).flatten(1)
    return torch.nn.functional.cosine_similarity(x, y, dim=1, eps=1e-30).mean()
