"""Where a refinement computes."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Place:
    """Where and how to compute.

    Attributes:
        device: of both models and of the batches.
        context: the precision of the forward passes, as a context manager.
        fused: whether both heads are plain linear maps, and logits need not be stored.
    """

    device: torch.device
    context: Callable[[], AbstractContextManager[Any]]
    fused: bool = False
