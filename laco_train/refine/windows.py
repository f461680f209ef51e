"""Each layer that stands for several is fitted alone to what they did, all such layers at once.

Every fit needs the original's hidden states only, so that one forward pass of the original serves them all.
Shapes: B blocks, T tokens, D hidden size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from laco_train.collapse import CollapsePlan, decoder_of
from laco_train.collapse.similarity import hidden_of
from laco_train.training.distill import hidden_error, matched_layers
from laco_train.training.loss import Batch, model_inputs


@dataclass(frozen=True)
class Window:
    """A layer that stands for several.

    Attributes:
        layer: its index in the collapsed model.
        first: the original layer whose input is its input.
        last: the original layer whose output it should give.
    """

    layer: int
    first: int
    last: int


def windows_of(plan: CollapsePlan) -> tuple[Window, ...]:
    """The layers left by `plan` that stand for more than themselves: for layers merged into them or dropped after."""
    ends = matched_layers(plan.lineage, plan.source_depth)
    every = (Window(at, held[0], end) for at, (held, end) in enumerate(zip(plan.lineage, ends, strict=True)))
    return tuple(window for window in every if window.last > window.first)


def window_errors(
    original: PreTrainedModel, collapsed: PreTrainedModel, windows: Sequence[Window], batch: Batch
) -> Tensor:
    """(number of windows,) relative squared error of each layer on the original's states, with a graph.

    The error of a token is relative to the square of the state that it should reach, see `hidden_error`.
    """
    stack = decoder_of(collapsed).stack
    with torch.no_grad(), _recorded(original, windows) as (entering, leaving):
        original.base_model(**model_inputs(original, batch))
    errors = []
    for window in windows:
        args, kwargs = entering[window.first]
        reached = hidden_of(stack[window.layer](*args, **kwargs))
        errors.append(hidden_error(reached.flatten(0, 1), leaving[window.last].flatten(0, 1)).mean())
    return torch.stack(errors)


@contextmanager
def _recorded(
    original: PreTrainedModel, windows: Sequence[Window]
) -> Iterator[tuple[dict[int, tuple[Any, Any]], dict[int, Tensor]]]:
    """Arguments with which the windows' first layers are called, and (B, T, D) what their last ones give, by index."""
    stack = decoder_of(original).stack
    entering: dict[int, tuple[Any, Any]] = {}
    leaving: dict[int, Tensor] = {}

    def note_input(at: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        entering[at] = (args, kwargs)

    def note_output(at: int, module: nn.Module, args: Any, output: Any) -> None:
        leaving[at] = hidden_of(output)

    hooks = []
    for window in windows:
        first, last = window.first, window.last
        hooks.append(stack[first].register_forward_pre_hook(_at(note_input, first), with_kwargs=True))
        hooks.append(stack[last].register_forward_hook(_at(note_output, last)))
    try:
        yield entering, leaving
    finally:
        for hook in hooks:
            hook.remove()


def _at(note: Any, at: int) -> Any:
    def called(*arguments: Any) -> None:
        note(at, *arguments)

    return called
