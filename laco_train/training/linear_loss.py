"""Losses from hidden states, a slice of tokens at a time: logits of a whole batch never exist.

Liger kernel has the like, but reads the number of targets on the host in every step.

Shapes: N tokens, D hidden size, V vocabulary; n tokens of a slice.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Logits in bfloat16 of one slice: 8,192 tokens of a vocabulary of 32,000 are 0.5 GiB. With a teacher three such exist.
ELEMENTS_AT_ONCE = 2**28
_IGNORED = -100

Kernel = Callable[[Tensor, slice], tuple[Tensor, Tensor, Tensor]]
"""From logits (n, V) and which tokens they are of: what is minimised, parts of it to tell, and its gradient (n, V)."""


def slice_loss(logits: Tensor, labels: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss of a slice in nats, and its gradient by the logits, both times `share`.

    Args:
        logits: (n, V), any floating-point type; arithmetic is in float32.
        labels: (n,), -100 where there is no target.
        share: 1 / number of targets, a float32 scalar.
    """
    counted = labels != _IGNORED
    entropy, slope = _cross_entropy(logits.float(), labels)
    weight = (counted.float() * share)[:, None]
    return torch.where(counted, entropy, 0.0).sum() * share, (slope * weight).to(logits.dtype)


def slice_distillation(
    logits: Tensor, taught: Tensor, labels: Tensor, share: Tensor, mixture: float, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(1 - a) cross entropy + a T^2 KL(teacher || student) of a slice, both parts, and its gradient by the logits.

    All are sums over targets times `share`.

    Args:
        logits, taught: (n, V), of the student and of the teacher; arithmetic is in float32.
        labels, share: as in `slice_loss`.
        mixture: a.
        temperature: T, which both distributions are softened by in the divergence.
    """
    counted = labels != _IGNORED
    entropy, by_text = _cross_entropy(logits.float(), labels)
    student = (logits.float() / temperature).log_softmax(-1)
    teacher = (taught.float() / temperature).log_softmax(-1)
    apart = temperature**2 * (teacher.exp() * (teacher - student)).sum(-1)
    by_teacher = temperature * (student.exp() - teacher.exp())
    parts = torch.stack([torch.where(counted, part, 0.0).sum() for part in (entropy, apart)]) * share
    slope = ((1 - mixture) * by_text + mixture * by_teacher) * (counted.float() * share)[:, None]
    return (1 - mixture) * parts[0] + mixture * parts[1], parts, slope.to(logits.dtype)


def _cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of each token (n,), and its gradient by the logits (n, V); anything where there is no target."""
    target = labels.clamp(min=0)[:, None]
    normaliser = logits.logsumexp(-1, keepdim=True)
    one_hot = torch.arange(logits.shape[-1], device=logits.device) == target
    entropy = (normaliser - logits.gather(-1, target)).squeeze(-1)
    return entropy, (logits - normaliser).exp() - one_hot.float()


class _LinearLoss(torch.autograd.Function):
    """Gradients are made with the loss, as both need the logits; the backward pass only scales them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
        needs = ctx.needs_input_grad
        narrow = weight.to(hidden.dtype)
        d_hidden = torch.empty_like(hidden) if needs[0] else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if needs[1] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)  # the default may be bfloat16
        parts = torch.zeros_like(total)
        for rows in _slices(len(hidden), len(weight)):
            loss, found, slope = kernel(hidden[rows] @ narrow.t(), rows)
            total = total + loss
            parts = parts + found
            if d_hidden is not None:
                torch.mm(slope, narrow, out=d_hidden[rows])
            if d_weight is not None:
                d_weight += _product(slope.t(), hidden[rows])
        if d_weight is not None:
            d_weight = d_weight.to(weight.dtype)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.mark_non_differentiable(parts)
        return total, parts

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, of_parts: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        return (
            None if d_hidden is None else d_hidden * upstream.to(d_hidden.dtype),
            None if d_weight is None else d_weight * upstream.to(d_weight.dtype),
            None,
        )


def _slices(tokens: int, vocabulary: int) -> list[slice]:
    rows = max(ELEMENTS_AT_ONCE // vocabulary, 1)
    return [slice(start, min(start + rows, tokens)) for start in range(0, tokens, rows)]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, summed and left in float32."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(function, dynamic=False)
    return compiled


def _share(labels: Tensor) -> Tensor:
    """1 / number of targets."""
    return 1.0 / (labels != _IGNORED).sum().clamp(min=1).float()


def linear_loss(hidden: Tensor, weight: Tensor, labels: Tensor, *, compiled: bool) -> Tensor:
    """Mean cross-entropy of ``hidden @ weight.T`` in nats per target, a float32 scalar.

    Args:
        hidden: (N, D).
        weight: (V, D), of the same type or one that is rounded to it.
        labels: (N,) the next token of each, -100 where there is none.
        compiled: fuse the arithmetic on logits by torch.compile.
    """
    arithmetic = _compiled(slice_loss) if compiled else slice_loss
    share = _share(labels)

    def kernel(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        loss, slope = arithmetic(logits, labels[rows], share)
        return loss, loss, slope

    loss, _ = _LinearLoss.apply(hidden, weight, kernel)
    return loss


@dataclass(frozen=True)
class Head:
    """What logits are made of: ``hidden @ weight.T``.

    Attributes:
        hidden: (N, D).
        weight: (V, D), of the same type or one that is rounded to it.
    """

    hidden: Tensor
    weight: Tensor


def linear_distillation(
    student: Head, teacher: Head, labels: Tensor, *, mixture: float, temperature: float, compiled: bool
) -> tuple[Tensor, Tensor]:
    """Mean of (1 - a) cross entropy + a T^2 KL(teacher || student) over targets, in nats: a float32 scalar.

    Args:
        student: gets the gradients.
        teacher: of as many tokens and the same vocabulary; its width may be another.
        labels, compiled: as in `linear_loss`.
        mixture, temperature: a and T.

    Returns:
        The loss, and both means (2,) unweighted, without a graph.
    """
    arithmetic = _compiled(slice_distillation) if compiled else slice_distillation
    share = _share(labels)
    lesson = teacher.weight.to(teacher.hidden.dtype).t()

    def kernel(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        taught = teacher.hidden[rows] @ lesson
        found: tuple[Tensor, Tensor, Tensor] = arithmetic(logits, taught, labels[rows], share, mixture, temperature)
        return found

    return _LinearLoss.apply(student.hidden, student.weight, kernel)
