"""Where a refinement computes."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from laco_train.training.fused_distill import Trial


@dataclass(frozen=True)
class Place:
    """Where and how to compute.

    Attributes:
        device: of both models and of the batches.
        context: the precision of the forward passes, as a context manager.
        trial: with which the divergence without logits is tried; None: logits are stored.
    """

    device: torch.device
    context: Callable[[], AbstractContextManager[Any]]
    trial: Trial | None = None
