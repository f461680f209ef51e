"""One layer trained to do what a block of layers does, on the original's hidden states.

Shapes: S samples, T padded tokens, D hidden size.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from laco_train.collapse.similarity import CalibrationBatch, LayerCall, hidden_of, recorded_calls
from laco_train.collapse.walk import Walk

STEPS = 300
LEARNING_RATE = 1e-3  # at the first step; falls linearly to 0
_TOKENS_A_STEP = 2048


@torch.enable_grad()
def fit_layer(walk: Walk, first: int, size: int) -> tuple[dict[str, Tensor], int]:
    """Fit layer `first` of the original to map what enters it to what leaves layer ``first + size - 1``.

    Adam on the mean squared error over all tokens, in float32; samples in order, over and over, so that nothing is
    drawn at random. The model itself is not changed.

    Args:
        walk: as it was made, with no window accepted yet.
        first: index of the block's first layer.
        size: layers in the block.

    Returns:
        The layer's parameters by name, rounded once to their own dtypes, and the number of tokens read.
    """
    states = walk.states()
    layer = walk.decoder.stack[first]
    weights = {name: p.detach().float().clone().requires_grad_() for name, p in layer.named_parameters()}
    optimizer = torch.optim.Adam(weights.values(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    samples, width = walk.mask.shape
    rows = max(1, _TOKENS_A_STEP // width)
    starts = range(0, samples, rows)
    tokens = 0
    for step in range(STEPS):
        start = starts[step % len(starts)]
        part = slice(start, start + rows)
        counted = walk.mask[part].bool()
        call = _in_float32(_call(walk, part, first))
        output = functional_call(layer, weights, (states[first][part].float(), *call.args), call.kwargs)
        error = hidden_of(output)[counted] - states[first + size][part][counted].float()
        optimizer.zero_grad()
        error.square().mean().backward()
        optimizer.step()
        schedule.step()
        tokens += int(walk.batch.mask[part].sum())
    fitted = {name: weights[name].detach().to(p.dtype) for name, p in layer.named_parameters()}
    return fitted, tokens


@torch.no_grad()
def _call(walk: Walk, part: slice, first: int) -> LayerCall:
    if walk.batch.samples <= part.stop - part.start:
        return walk.original.calls[first]
    batch: CalibrationBatch = dataclasses.replace(
        walk.batch, input_ids=walk.batch.input_ids[part], mask=walk.batch.mask[part]
    )
    return recorded_calls(walk.decoder, batch, 1, tuple_outputs=walk.original.tuple_outputs)[first]


def _in_float32(call: LayerCall) -> LayerCall:
    def cast(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.float()
        return tuple(cast(item) for item in value) if isinstance(value, tuple) else value

    return LayerCall(tuple(map(cast, call.args)), {name: cast(value) for name, value in call.kwargs.items()})
