"""How decoder layers are called in training: compiled, and recomputed in the backward pass where memory asks for it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from laco_train.collapse import decoder_of
from laco_train.training.attention import attends_by_documents, set_document_attention
from laco_train.training.loss import base_of


def arrange_layers(model: nn.Module, *, compiled: bool, recompute: int) -> None:
    """Compile each decoder layer on its own or none, and let the first `recompute` keep no activations.

    Recomputation lies outside the compiled function: where Transformers' own lies differs between its versions. Names
    of parameters stay, and copies of a model that is not sharded are plain: torch leaves ``_compiled_call_impl`` out of
    them. Sharded layers gather their weights in hooks, which stay outside of both.

    Args:
        model: a Transformers model or one wrapped by peft.
    """
    for number, layer in enumerate(decoder_of(base_of(model)).stack):
        sharded = isinstance(layer, FSDPModule)
        plain = partial(type(layer).forward, layer) if sharded else layer._call_impl
        call = _compiled(plain) if compiled else plain
        arranged = _recomputed(layer, call) if number < recompute else call
        if sharded:
            layer.forward = arranged
        else:
            layer._compiled_call_impl = arranged if compiled or number < recompute else None


def _compiled(call: Callable[..., Any]) -> Callable[..., Any]:
    # in the whole process: else Dynamo cuts a layer's graph wherever a bucket of DDP's gradients ends
    torch._dynamo.config.optimize_ddp = False
    compiled: Callable[..., Any] = torch.compile(call, dynamic=False)
    return compiled


@contextmanager
def called_plainly(model: nn.Module) -> Iterator[None]:
    """`model` as Transformers alone would call it, for inputs that are no packed blocks; put back afterwards.

    Compiled layers would be compiled anew for each shape, and attention by documents needs masks of them.

    Args:
        model: a Transformers model or one wrapped by peft.
    """
    stack = decoder_of(base_of(model)).stack
    arranged = [(layer._compiled_call_impl, vars(layer).get("forward")) for layer in stack]
    by_documents = attends_by_documents(model)
    try:
        for layer in stack:
            layer._compiled_call_impl = None
            if isinstance(layer, FSDPModule):
                vars(layer).pop("forward", None)
        if by_documents:
            set_document_attention(model, False)
        yield
    finally:
        for layer, (call, forward) in zip(stack, arranged, strict=True):
            layer._compiled_call_impl = call
            if forward is not None:
                layer.forward = forward
        if by_documents:
            set_document_attention(model, True)


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
