"""Distillation by the fast kernels: logits of a whole batch, the student's or the teacher's, never exist."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from laco_train.errors import InputError
from laco_train.settings import DistillSettings
from laco_train.training.distill import Distillation, DistillLoss
from laco_train.training.fused import Kernels, head_of, same_loss, without_autocast
from laco_train.training.layers import arrange_layers
from laco_train.training.linear_loss import linear_distillation
from laco_train.training.loss import Batch, next_tokens
from laco_train.training.parallel import as_forward
from laco_train.training.teacher import TeacherOnDevice

DistillStep = Callable[[nn.Module, Batch], DistillLoss]
"""From a student and a batch on its device."""


class FusedDistillation:
    """What `Distillation` gives on logits alone; both heads must be plain linear maps.

    Args:
        settings: the recipe's section.
        teacher: in eval mode, on the student's device; it gets no gradient.
    """

    def __init__(self, settings: DistillSettings, teacher: nn.Module):
        self.settings = settings
        self.teacher = teacher

    def __call__(self, student: nn.Module, batch: Batch) -> DistillLoss:
        """(1 - a) cross entropy + a T^2 KL(teacher || student), over the targets of `batch`."""
        with torch.no_grad():
            taught = head_of(self.teacher, batch)
        labels = next_tokens(batch).flatten()

        def work() -> tuple[Tensor, Tensor]:
            head, s = head_of(student, batch), self.settings
            with without_autocast():
                return linear_distillation(
                    head, taught, labels, mixture=s.logits, temperature=s.temperature, compiled=True
                )

        total, parts = as_forward(student, work)
        return DistillLoss(total, parts[0], parts[1], torch.zeros_like(parts[0]))


@dataclass(frozen=True)
class Trial:
    """What a way to the loss is tried on.

    Attributes:
        student: on its device, in training mode, its attention switched as `kernels` say.
        kernels: of the student.
        probe: a block or two, on that device.
        context: the precision under which the student trains.
    """

    student: nn.Module
    kernels: Kernels
    probe: Batch
    context: Callable[[], AbstractContextManager[Any]]

    def without_logits(self, distillation: Distillation, teacher: nn.Module) -> tuple[DistillStep, tuple[str, ...]]:
        """`distillation` without logits if it then gives the same, and else why not; both heads are plain."""
        fused, reasons = FusedDistillation(distillation.settings, teacher), list[str]()
        with torch.no_grad(), self.context():
            expected = distillation(self.student, self.probe).total
            same = same_loss(
                self.student,
                self.probe,
                expected,
                lambda student, batch: fused(student, batch).total,
                attention=self.kernels.attention,
                reasons=reasons,
            )
        return fused if same else distillation, tuple(f"distillation: {reason}" for reason in reasons)


def hastened(
    distillation: Distillation, trial: Trial, choose: Callable[[nn.Module], Kernels]
) -> tuple[DistillStep, tuple[str, ...]]:
    """The fastest way to `distillation`, and why it is not faster: the teacher by its kernels, logits never stored.

    A teacher whose words are on disk is left alone; one whose hidden states are wanted keeps its layers as they are, as
    Transformers' hooks on them, each another, would have each compiled by itself.

    Args:
        choose: tries a model's kernels and switches its attention.
    """
    teacher: Any = distillation.teacher
    if not isinstance(teacher, TeacherOnDevice):
        return distillation, ("distillation: with logits, as its teacher's words are on disk",)
    own = choose(teacher.model)
    slow = tuple(f"teacher: {reason}" for reason in own.reasons)
    if teacher.layers:
        return distillation, (*slow, "distillation: with logits, as hidden states are learned too")
    step: DistillStep = distillation
    if trial.kernels.loss and own.loss:
        step, why = trial.without_logits(distillation, teacher.model)
        slow += why
    if own.compiled:  # after the trial, whose shape is another: each is compiled for itself
        try:
            arrange_layers(teacher.model, compiled=True, recompute=0)
        except InputError as error:  # a family whose layers can't be told
            slow += (f"teacher: layers: {error}",)
    return step, slow
