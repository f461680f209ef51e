"""AdamW without decay on norms and biases; linear warm-up, then a cosine."""

import math
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from laco_train.settings import OptimizerSettings, ScheduleSettings


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices decay, vectors (norms, biases) don't."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]


def adamw(model: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of `model`, fused where they are on a GPU."""
    groups = [group for group in parameter_groups(model, settings.weight_decay) if group["params"]]
    optimizer = torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        fused=all(p.is_cuda for group in groups for p in group["params"]),
    )
    # unscaling is left to the scaler, else Lightning refuses to clip gradients of a fused optimizer
    optimizer._step_supports_amp_scaling = False
    return optimizer


def learning_rate_factor(step: int, total_steps: int, settings: ScheduleSettings) -> float:
    """Share of the peak learning rate that optimizer step `step` (from 0) uses."""
    warmup = min(settings.warmup_steps, total_steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
    return settings.final_ratio + (1 - settings.final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_cosine(optimizer: torch.optim.Optimizer, settings: ScheduleSettings, total_steps: int) -> LambdaLR:
    """The schedule of `learning_rate_factor`, to be stepped once an optimizer step."""
    return LambdaLR(optimizer, lambda step: learning_rate_factor(step, total_steps, settings))
