"""What benchmarks/train.py compares with: a training loop as one writes it on plain Transformers, and a reference.

Both take the batches of `fit`, documents kept apart by position_ids, and its learning rates.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from laco_train.settings import OptimizerSettings
from laco_train.training.optim import parameter_groups

Batch = dict[str, Tensor]
MIXTURE = 0.5  # share of the divergence where there is a teacher


@dataclass(frozen=True)
class Outcome:
    """Losses of the optimizer steps, tokens per second after the first `warmup` of them, and peak memory."""

    losses: list[float]
    tokens_per_second: float
    peak_gib: float


def loss_of(model: PreTrainedModel, batch: Batch, autocast: bool, teacher: PreTrainedModel | None = None) -> Tensor:
    """Transformers' own loss; with a teacher half of it, and half the divergence from it, as torch has that."""
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        out = model(**inputs, labels=batch["labels"], use_cache=False)
        if teacher is None:
            return out.loss
        with torch.no_grad():
            taught = teacher(**inputs, use_cache=False).logits
    counted = (batch["labels"][:, 1:] != -100).flatten()
    student, lesson = (logits[:, :-1].flatten(0, 1).float().log_softmax(-1) for logits in (out.logits, taught))
    apart = torch.nn.functional.kl_div(student, lesson, reduction="none", log_target=True).sum(-1)
    return (1 - MIXTURE) * out.loss + MIXTURE * (apart * counted).sum() / counted.sum()


def parts(batch: Batch, micro: int, device: torch.device) -> list[Batch]:
    """A step's blocks on the device, `micro` at a time."""
    moved = {name: batch[name].to(device) for name in ("input_ids", "position_ids", "labels")}
    count = len(moved["input_ids"]) // micro
    return [{name: value.chunk(count)[k] for name, value in moved.items()} for k in range(count)]


def plain(
    model: PreTrainedModel,
    steps: Iterable[Batch],
    rates: list[float],
    settings: OptimizerSettings,
    *,
    micro: int,
    clip: float | None,
    autocast: bool,
    warmup: int,
    teacher: PreTrainedModel | None = None,
) -> Outcome:
    """AdamW (fused where there is a GPU) on the weights as they are; gradients accumulated over micro-batches."""
    device = model.device
    optimizer = torch.optim.AdamW(
        parameter_groups(model, settings.weight_decay),
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        fused=True,
    )
    model.train()
    losses: list[Tensor] = []
    began, tokens = time.perf_counter(), 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for number, (batch, rate) in enumerate(zip(steps, rates, strict=False)):
        if number == warmup:
            synchronize(device)
            began, tokens = time.perf_counter(), 0
        pieces = parts(batch, micro, device)
        total = torch.zeros((), device=device)
        for piece in pieces:
            loss = loss_of(model, piece, autocast, teacher) / len(pieces)
            loss.backward()
            total += loss.detach()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        tokens += batch["input_ids"].numel()
    synchronize(device)
    seconds = time.perf_counter() - began
    return Outcome([float(loss) for loss in losses], tokens / seconds, peak_gib(device))


def reference(
    model: PreTrainedModel, steps: Iterable[Batch], rates: list[float], settings: OptimizerSettings
) -> list[float]:
    """Losses with float32 weights and moments, bfloat16 arithmetic, no clipping.

    Each weight is stepped as soon as its gradient is there, which is then freed: 12 bytes a parameter fit where 16
    don't.
    """
    device = model.device
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizers = {}
    for group in parameter_groups(model, settings.weight_decay):
        for p in group["params"]:
            optimizers[p] = torch.optim.AdamW(
                [p],
                lr=settings.learning_rate,
                betas=(settings.beta1, settings.beta2),
                eps=settings.epsilon,
                weight_decay=group["weight_decay"],
                fused=True,
            )

            def stepped(parameter: Tensor) -> None:
                optimizers[parameter].step()
                parameter.grad = None

            p.register_post_accumulate_grad_hook(stepped)
    losses = []
    for batch, rate in zip(steps, rates, strict=False):
        for optimizer in optimizers.values():
            optimizer.param_groups[0]["lr"] = rate
        (piece,) = parts(batch, len(batch["input_ids"]), device)
        loss = loss_of(model, piece, autocast=True)
        loss.backward()
        losses.append(float(loss))
    return losses


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_gib(device: torch.device) -> float | None:
    """Peak of allocated memory on a GPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
