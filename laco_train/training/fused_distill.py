"""Distillation by the fast kernels: logits of a whole batch, the student's or the teacher's, never exist."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from laco_train.errors import InputError
from laco_train.settings import DistillSettings
from laco_train.training.distill import Distillation, DistillLoss
from laco_train.training.fused import Kernels, head_of, without_autocast
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
        teacher: frozen, in eval mode, on the student's device.
        compiled: fuse the arithmetic on logits by torch.compile.
    """

    def __init__(self, settings: DistillSettings, teacher: nn.Module, *, compiled: bool = True):
        self.settings = settings
        self.teacher = teacher
        self.compiled = compiled

    def __call__(self, student: nn.Module, batch: Batch) -> DistillLoss:
        """(1 - a) cross entropy + a T^2 KL(teacher || student), over the targets of `batch`."""
        with torch.no_grad():
            taught = head_of(self.teacher, batch)
        labels = next_tokens(batch).flatten()

        def work() -> tuple[Tensor, Tensor]:
            head, s = head_of(student, batch), self.settings
            with without_autocast():
                return linear_distillation(
                    head, taught, labels, mixture=s.logits, temperature=s.temperature, compiled=self.compiled
                )

        total, parts = as_forward(student, work)
        return DistillLoss(total, parts[0], parts[1], torch.zeros_like(parts[0]))


def hastened(distillation: Distillation, kernels: Kernels, choose: Callable[[nn.Module], Kernels]) -> DistillStep:
    """The fastest way to `distillation`: the teacher by the kernels that it can do with, logits never stored.

    A teacher whose words are on disk is left alone; one whose hidden states are wanted keeps its layers as they are, as
    Transformers' hooks on them, each another, would have each compiled by itself.

    Args:
        kernels: of the student.
        choose: tries a model's kernels and switches its attention.
    """
    teacher: Any = distillation.teacher
    if not isinstance(teacher, TeacherOnDevice):
        return distillation
    own = choose(teacher.model)
    if teacher.layers:
        return distillation
    if own.compiled:
        with suppress(InputError):  # a family whose layers can't be told
            arrange_layers(teacher.model, compiled=True, recompute=0)
    return FusedDistillation(distillation.settings, teacher.model) if kernels.loss and own.loss else distillation
