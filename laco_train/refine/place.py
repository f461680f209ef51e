"""Where a refinement computes."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from laco_train.training.fused_distill import DistillStep


@dataclass(frozen=True)
class Place:
    """Where and how to compute.

    Attributes:
        device: of both models and of the batches.
        context: the precision of the forward passes, as a context manager.
        divergence: from the original, of the collapsed model on a batch; None: by stored logits of both.
    """

    device: torch.device
    context: Callable[[], AbstractContextManager[Any]]
    divergence: DistillStep | None = None
