"""How decoder layers are called in training: compiled, and recomputed in the backward pass where memory asks for it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from laco_train.collapse import decoder_of
from laco_train.training.loss import base_of


def arrange_layers(model: nn.Module, *, compiled: bool, recompute: int) -> None:
    """Compile each decoder layer on its own or none, and let the first `recompute` keep no activations.

    Recomputation lies outside the compiled function: where Transformers' own lies differs between its versions. Names
    of parameters stay, and copies of the model are plain: torch leaves ``_compiled_call_impl`` out of them.

    Args:
        model: a Transformers model or one wrapped by peft.
    """
    for number, layer in enumerate(decoder_of(base_of(model)).stack):
        call = torch.compile(layer._call_impl, dynamic=False) if compiled else layer._call_impl
        arranged = _recomputed(layer, call) if number < recompute else call
        layer._compiled_call_impl = arranged if compiled or number < recompute else None


def _recomputed(layer: nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        if not (layer.training and torch.is_grad_enabled()):
            return call(*args, **kwargs)
        return checkpoint(call, *args, use_reentrant=False, context_fn=_same_default_dtype, **kwargs)

    return called


def _same_default_dtype() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    # Lightning's -true precisions set it for the forward pass alone, and a layer is compiled anew for another
    return nullcontext(), _default_dtype(torch.get_default_dtype())


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
