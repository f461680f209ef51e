"""Next-token loss from hidden states, a slice of tokens at a time: logits of a whole batch never exist.

Liger kernel's does the same, but reads the number of targets on the host in every step.

Shapes: N tokens, D hidden size, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

# Logits in bfloat16 of one slice: 8,192 tokens of a vocabulary of 32,000 are 0.5 GiB.
ELEMENTS_AT_ONCE = 2**28
_IGNORED = -100


def slice_loss(logits: Tensor, labels: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss of a slice in nats, and its gradient by the logits, both times `share`.

    Args:
        logits: (n, V), any floating-point type; arithmetic is in float32.
        labels: (n,), -100 where there is no target.
        share: 1 / number of targets, a float32 scalar.
    """
    exact = logits.float()
    counted = labels != _IGNORED
    target = labels.clamp(min=0)[:, None]
    normaliser = exact.logsumexp(-1, keepdim=True)
    loss = (normaliser - exact.gather(-1, target)).squeeze(-1)
    one_hot = torch.arange(logits.shape[-1], device=logits.device) == target
    slope = ((exact - normaliser).exp() - one_hot.float()) * (counted.float() * share)[:, None]
    return torch.where(counted, loss, 0.0).sum() * share, slope.to(logits.dtype)


class _LinearLoss(torch.autograd.Function):
    """Gradients are made with the loss, as both need the logits; the backward pass only scales them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, compiled: bool) -> Tensor:
        kernel = _compiled_slice_loss() if compiled else slice_loss
        share = 1.0 / (labels != _IGNORED).sum().clamp(min=1).float()
        needs = ctx.needs_input_grad
        narrow = weight.to(hidden.dtype)
        d_hidden = torch.empty_like(hidden) if needs[0] else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if needs[1] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)  # the default may be bfloat16
        rows = max(ELEMENTS_AT_ONCE // weight.shape[0], 1)
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            loss, slope = kernel(hidden[part] @ narrow.t(), labels[part], share)
            total += loss
            if d_hidden is not None:
                torch.mm(slope, narrow, out=d_hidden[part])
            if d_weight is not None:
                d_weight += _product(slope.t(), hidden[part])
        if d_weight is not None:
            d_weight = d_weight.to(weight.dtype)
        ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        return (
            None if d_hidden is None else d_hidden * upstream.to(d_hidden.dtype),
            None if d_weight is None else d_weight * upstream.to(d_weight.dtype),
            None,
            None,
        )


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, summed and left in float32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


_COMPILED: Any = None


def _compiled_slice_loss() -> Any:
    global _COMPILED
    if _COMPILED is None:
        _COMPILED = torch.compile(slice_loss, dynamic=False)
    return _COMPILED


def linear_loss(hidden: Tensor, weight: Tensor, labels: Tensor, *, compiled: bool) -> Tensor:
    """Mean cross-entropy of ``hidden @ weight.T`` in nats per target, a float32 scalar.

    Args:
        hidden: (N, D).
        weight: (V, D), of the same type or one that is rounded to it.
        labels: (N,) the next token of each, -100 where there is none.
        compiled: fuse the arithmetic on logits by torch.compile.
    """
    loss: Tensor = _LinearLoss.apply(hidden, weight, labels, compiled)
    return loss
