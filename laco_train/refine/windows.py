"""Layers that stand for several, and what entered and left those in the original.

Fitting each to what they did needs the original's hidden states only, so that one forward pass serves them all.
Shapes: B blocks, T tokens, D hidden size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from laco_train.collapse import CollapsePlan, decoder_of
from laco_train.collapse.similarity import hidden_of
from laco_train.training.distill import matched_layers


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


@contextmanager
def recorded(
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
