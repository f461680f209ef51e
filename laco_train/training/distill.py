"""Losses against a teacher: divergence of next-token distributions, and error of hidden states at matched layers.

Shapes: N tokens (the blocks of a batch one after the other), V vocabulary, K tokens that a precomputed teacher names,
D hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from laco_train.settings import DistillSettings
from laco_train.training.loss import Batch, model_inputs, next_tokens, target_tokens

# Numbers in float32 at once in each of a handful of tensors: 64 MiB, 341 tokens of a vocabulary of 49,152.
ELEMENTS_AT_ONCE = 2**24
_IGNORED = -100
EPSILON = 1e-6

Terms = Callable[[Tensor, slice], Tensor]


@dataclass(frozen=True)
class Lesson:
    """What a teacher says about a batch.

    Attributes:
        outcomes: (N, V) logits where `ids` is None, else (N, K + 1) log-probabilities at the temperature: of the tokens
            `ids` and of all others together; (N, K) if there are no others. None where logits are not asked for.
        ids: (N, K) tokens that the teacher names, int64, or None.
        hidden: for each of the student's layers the (N, D) state that it should reach; empty unless asked for.
    """

    outcomes: Tensor | None
    ids: Tensor | None = None
    hidden: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class DistillLoss:
    """`total` is what training minimises; the others are its parts, unweighted and without a graph.

    Attributes:
        next_token: nats per target token.
        logits: T squared times the divergence from the teacher, nats per target token; 0 unless asked for.
        hidden: mean relative squared error of hidden states; 0 unless asked for.
    """

    total: Tensor
    next_token: Tensor
    logits: Tensor
    hidden: Tensor


def distills(settings: DistillSettings) -> bool:
    """Whether there is anything to learn from a teacher."""
    return settings.logits > 0 or settings.hidden > 0


def matched_layers(lineage: Sequence[Sequence[int]], source_depth: int) -> tuple[int, ...]:
    """For each layer left, the original layer (from 0) whose output is what the next layer left expects for its input.

    That is the last of the originals merged into it, or the last dropped after it; for the last layer left, the last
    original of all.

    Args:
        lineage: for each layer left the originals merged into it, its own first (`CollapsePlan.lineage`).
        source_depth: number of original layers.
    """
    return tuple(first - 1 for first in [*(layer[0] for layer in lineage[1:]), source_depth])


def outputs(model: nn.Module, batch: Batch, *, hidden: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Logits (N, V) of a batch and, if asked for, the states (N, D) after each layer, the last after the final norm."""
    out = model(**model_inputs(model, batch), output_hidden_states=hidden)
    states = out.hidden_states[1:] if hidden else ()
    return out.logits.flatten(0, 1), tuple(state.flatten(0, 1) for state in states)


def divergence(logits: Tensor, outcomes: Tensor, ids: Tensor | None, temperature: float) -> Tensor:
    """KL(teacher || student) of each token, in nats, float32.

    With `ids` it is that of the distributions over those tokens and "any other", which never exceeds that over all.

    Args:
        logits: (n, V) of the student.
        outcomes, ids: see `Lesson`.
    """
    student = (logits.float() / temperature).log_softmax(-1)
    if ids is None:
        teacher = (outcomes.float() / temperature).log_softmax(-1)
    else:
        student, teacher = coarse(student, ids), outcomes
    return kl_div(student, teacher, reduction="none", log_target=True).sum(-1)


def coarse(log_probs: Tensor, ids: Tensor) -> Tensor:
    """Log-probabilities of the tokens `ids` (n, K) and of all others: (n, K + 1), or (n, K) if there are no others."""
    named = log_probs.gather(-1, ids)
    if ids.shape[-1] == log_probs.shape[-1]:
        return named
    others = log_probs.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([named, others], -1)


def hidden_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error of each token's state relative to the teacher's own square, float32 (n,).

    Relative for each token, as the first token's state is hundreds of times larger than others in many models.
    """
    target = teacher.float()
    return (student.float() - target).square().sum(-1) / (target.square().sum(-1) + EPSILON)


class Teacher(Protocol):
    """Says what it knows about a batch on the device."""

    def __call__(self, batch: Batch) -> Lesson: ...


class Distillation:
    """The loss of a student on a batch and on what a teacher says about it.

    The teacher is no part of the module that trains, so it reaches neither optimizer nor checkpoint nor export.

    Args:
        settings: the recipe's section.
        teacher: see `laco_train.training.teacher`.
    """

    def __init__(self, settings: DistillSettings, teacher: Teacher):
        self.settings = settings
        self.teacher = teacher

    def __call__(self, student: nn.Module, batch: Batch) -> DistillLoss:
        """(1 - a) cross entropy + a T^2 KL(teacher || student) + b hidden error, over the targets of `batch`."""
        s = self.settings
        lesson: Lesson = self.teacher(batch)
        logits, states = outputs(student, batch, hidden=s.hidden > 0)
        prediction, parts = self._prediction(logits, batch, lesson)
        counted = next_tokens(batch).flatten() != _IGNORED
        hidden = torch.stack(
            [
                sum_in_slices(state, _error_against(target, counted), (1.0,))[0] / counted.sum().clamp(min=1)
                for state, target in zip(states, lesson.hidden, strict=True)
            ]
            or [logits.new_zeros((), dtype=torch.float32)]
        ).mean()
        return DistillLoss(prediction + s.hidden * hidden, parts[0], parts[1], hidden.detach())

    def _prediction(self, logits: Tensor, batch: Batch, lesson: Lesson) -> tuple[Tensor, Tensor]:
        s, labels = self.settings, next_tokens(batch).flatten()

        def terms(part: Tensor, rows: slice) -> Tensor:
            target = labels[rows]
            entropy = cross_entropy(part.float(), target, ignore_index=_IGNORED, reduction="sum")
            if lesson.outcomes is None:
                return torch.stack([entropy, torch.zeros_like(entropy)])
            ids = None if lesson.ids is None else lesson.ids[rows]
            apart = divergence(part, lesson.outcomes[rows], ids, s.temperature)
            return torch.stack([entropy, s.temperature**2 * (apart * (target != _IGNORED)).sum()])

        total, parts = sum_in_slices(logits, terms, (1 - s.logits, s.logits))
        count = target_tokens(batch).clamp(min=1)
        return total / count, parts / count


def _error_against(target: Tensor, counted: Tensor) -> Terms:
    return lambda part, rows: (hidden_error(part, target[rows]) * counted[rows]).sum()[None]


def sum_in_slices(vectors: Tensor, terms: Terms, weights: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Weighted sum of sums over tokens, of which only a slice of tokens exists in float32 at a time.

    Args:
        vectors: (N, width), such as logits; the only thing that gets a gradient.
        terms: from a slice of `vectors` and which rows it is to one sum for each of `weights`.

    Returns:
        The weighted sum, and the sums without weights and without a graph; float32.
    """
    total, parts = _Sliced.apply(vectors, terms, weights)
    return total, parts


class _Sliced(torch.autograd.Function):
    """Computes the gradient of each slice right after its value, so that nothing but the gradient is kept."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, terms: Terms, weights: tuple[float, ...]) -> tuple[Tensor, Tensor]:
        # filled on the device: a copy from the host would wait for it
        weight = torch.stack([vectors.new_full((), value, dtype=torch.float32) for value in weights])
        sums = torch.zeros_like(weight)
        gradient = torch.empty_like(vectors) if ctx.needs_input_grad[0] else None
        size = max(1, ELEMENTS_AT_ONCE // vectors.shape[1])
        for start in range(0, len(vectors), size):
            rows = slice(start, start + size)
            part = vectors[rows].detach().requires_grad_(gradient is not None)
            with torch.set_grad_enabled(gradient is not None):
                found = terms(part, rows)
            if gradient is not None:
                (gradient[rows],) = torch.autograd.grad(found, part, weight)
            sums += found.detach()
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(sums)
        return (sums * weight).sum(), sums

    @staticmethod
    def backward(ctx: Any, total: Tensor, sums: Tensor) -> tuple[Tensor | None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (None if gradient is None else gradient * total), None, None
