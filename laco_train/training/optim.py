"""AdamW without decay on norms and biases, whichever keeps small updates; linear warm-up, then a cosine."""

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from laco_train.errors import InputError
from laco_train.precision import refuse_float16
from laco_train.settings import OptimizerSettings, ScheduleSettings
from laco_train.training.bf16_adamw import BF16AdamW


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices decay, norms and biases (those of experts are stacked) don't."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decays = {name: p.ndim >= 2 and not name.endswith("bias") for name, p in trainable.items()}
    return [
        {"params": [p for name, p in trainable.items() if decays[name]], "weight_decay": weight_decay},
        {"params": [p for name, p in trainable.items() if not decays[name]], "weight_decay": 0.0},
    ]


def adamw(model: nn.Module, settings: OptimizerSettings, seed: int = 0) -> Optimizer:
    """AdamW over the trainable parameters of `model`; its step honours ``grad_scale`` and ``found_inf``.

    Args:
        seed: of stochastic rounding; the same on all ranks.

    Raises:
        InputError: parameters of float16; 8-bit moments without torchao, off the GPU, or with exact small updates.
    """
    groups = [group for group in parameter_groups(model, settings.weight_decay) if group["params"]]
    parameters = [p for group in groups for p in group["params"]]
    refuse_float16(p.dtype for p in parameters)
    bf16 = any(p.dtype == torch.bfloat16 for p in parameters)
    common: dict[str, Any] = {
        "lr": settings.learning_rate,
        "betas": (settings.beta1, settings.beta2),
        "eps": settings.epsilon,
    }
    optimizer: Optimizer
    if settings.eight_bit:
        optimizer = _eight_bit(groups, common, parameters, settings)
    elif bf16 and settings.small_updates != "nearest":
        optimizer = BF16AdamW(groups, **common, exact=settings.small_updates == "float32", seed=seed)
    else:
        optimizer = torch.optim.AdamW(groups, **common, fused=True)
    # unscaling is left to the scaler, else Lightning refuses to clip gradients of a fused optimizer
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return optimizer


def _eight_bit(
    groups: list[dict[str, Any]], common: dict[str, Any], parameters: list[nn.Parameter], settings: OptimizerSettings
) -> Optimizer:
    key = "model.optimizer.eight_bit"
    if settings.small_updates == "float32":
        raise InputError(key, "goes not with model.optimizer.small_updates: float32; use stochastic")
    if importlib.util.find_spec("torchao") is None:
        raise InputError(key, "needs torchao: pip install 'laco-train[eight-bit]', or set it to false")
    if not all(p.is_cuda for p in parameters):
        raise InputError(key, "needs a GPU; set it to false")
    from torchao.optim import AdamW8bit

    class HostGuardedAdamW8bit(AdamW8bit):
        """torchao's, which knows neither ``grad_scale`` nor ``found_inf``: the host looks before each step."""

        grad_scale: torch.Tensor | None = None
        found_inf: torch.Tensor | None = None

        @torch.no_grad()
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            if self.found_inf is not None and bool(self.found_inf):
                return loss
            if self.grad_scale is not None:
                gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
                torch._foreach_div_(gradients, self.grad_scale)
            super().step()
            return loss

    rounds = settings.small_updates == "stochastic" and all(p.dtype == torch.bfloat16 for p in parameters)
    optimizer: Optimizer = HostGuardedAdamW8bit(groups, **common, bf16_stochastic_round=rounds)
    return optimizer


def learning_rate_factor(step: int, total_steps: int, settings: ScheduleSettings) -> float:
    """Share of the peak learning rate that optimizer step `step` (from 0) uses."""
    warmup = min(settings.warmup_steps, total_steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
    return settings.final_ratio + (1 - settings.final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_cosine(optimizer: Optimizer, settings: ScheduleSettings, total_steps: int) -> LambdaLR:
    """The schedule of `learning_rate_factor`, to be stepped once an optimizer step."""
    return LambdaLR(optimizer, lambda step: learning_rate_factor(step, total_steps, settings))
