"""Leaves out steps whose gradients are not finite, and clips, without the host waiting (issue 5, Divergence)."""

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from laco_train.training.parallel import whole


class SkippedSteps:
    """Counts, on the device, the optimizer steps that were left out.

    Attributes:
        total: steps left out so far, an int64 scalar on the device of the gradients; None before the first step.
        longest: most of them in a row, likewise.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.longest: Tensor | None = None
        self._in_a_row: Tensor | None = None

    def count(self, broken: Tensor) -> None:
        """Note a step that is left out if `broken`, a boolean scalar."""
        if self.total is None or self.longest is None or self._in_a_row is None:
            self.total, self.longest, self._in_a_row = (
                torch.zeros((), dtype=torch.int64, device=broken.device) for _ in range(3)
            )
        self.total = self.total + broken
        self._in_a_row = torch.where(broken, self._in_a_row + 1, 0)
        self.longest = torch.maximum(self.longest, self._in_a_row)


def guard_step(optimizer: Optimizer, largest_norm: float | None, skipped: SkippedSteps) -> Tensor:
    """Make the next step of `optimizer` divide its gradients where they are too large, or nothing where not finite.

    Gradients themselves stay as they are: the optimizers of `laco_train.training.optim` scale as they read them.

    Args:
        largest_norm: of all gradients together; None or 0: never scale.

    Returns:
        The norm of all gradients, a float32 scalar on the device.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = whole(nn.utils.get_total_norm(gradients)).float()
    broken = ~torch.isfinite(norm)
    scale = (norm / largest_norm).clamp(min=1.0) if largest_norm else torch.ones_like(norm)
    optimizer.grad_scale = torch.where(broken, 1.0, scale)  # type: ignore[attr-defined]
    optimizer.found_inf = broken.float()  # type: ignore[attr-defined]
    skipped.count(broken)
    return norm
