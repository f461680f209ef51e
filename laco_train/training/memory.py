"""How much memory a run took, what an out-of-memory error is, and what to try after one."""

import os
import re
import resource
import sys
from dataclasses import dataclass
from typing import Literal

import torch

from laco_train.settings import DataSettings, ModelSettings, SpeedSettings

Phase = Literal["before", "step", "optimizer", "validation", "export"]
_GIB = 2**30
_SHORTEST_BLOCK = 128  # a halved block is not advised below this


def peak_gib(device: torch.device) -> float:
    """Most memory at once: allocated on the CUDA device since its statistics began, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _GIB
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB


def limit_gib(device: torch.device) -> float:
    """Memory of the CUDA device, else of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / _GIB
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch found no memory, on a GPU or on the CPU, whose allocator has no error type of its own."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


def asked_for(error: BaseException) -> str:
    """What the failed allocation was for, such as ``2.00 GiB``; empty if the error doesn't tell."""
    text = str(error)
    if found := re.search(r"Tried to allocate ([\d.]+ \w+)", text):
        return found[1]
    found = re.search(r"tried to allocate (\d+) bytes", text)
    return f"{int(found[1]) / _GIB:.2f} GiB" if found else ""


@dataclass(frozen=True)
class Situation:
    """A run that found no memory.

    Attributes:
        phase: what it was doing.
        model, data, speed: its recipe.
        searched: whether it began with a search that did not stream weights.
        accumulate: trainer.accumulate_grad_batches.
        gpu: whether it ran on one.
        free_gib: what weights, gradients and optimizer leave of the device; None: not known.
    """

    phase: Phase
    model: ModelSettings
    data: DataSettings
    speed: SpeedSettings
    searched: bool = False
    accumulate: int = 1
    gpu: bool = True
    free_gib: float | None = None


def advice(s: Situation) -> str:
    """The settings to try next: one change, and the batch, block and checkpointing as they should then be."""
    change = _change(s)
    batch, block, checkpointing = str(s.data.batch_size), str(s.data.block_size), str(s.speed.checkpointing)
    if change == "batch":
        parts = _least_factor(s.data.batch_size)
        batch += f" -> {s.data.batch_size // parts}"
        if s.phase != "before":
            accumulate = f"{s.accumulate} -> {s.accumulate * parts}"
            batch += f" with trainer.accumulate_grad_batches {accumulate} (same tokens per optimizer step)"
    elif change == "block":
        block += f" -> {s.data.block_size // 2}"
    elif change == "checkpointing":
        checkpointing += " -> all"
    settings = f"data.batch_size {batch}, data.block_size {block}, speed.checkpointing {checkpointing}"
    if change in ("batch", "block", "checkpointing"):
        return settings
    return f"{change}; with {settings}"


def _change(s: Situation) -> str:
    """The one change most likely to help: batch, block, checkpointing, or in words."""
    if s.phase == "export":
        return "the verb export on the last checkpoint, in a process of its own"
    if s.phase == "before" and s.gpu and s.searched:
        return "collapse.placement stream"
    crowded = s.phase == "optimizer" or (s.free_gib is not None and s.free_gib <= 0)
    return (_lighter_state(s) if crowded else None) or _smaller_activations(s) or _lighter_state(s) or _LAST_RESORT


def _smaller_activations(s: Situation) -> str | None:
    if s.data.batch_size > 1:
        return "batch"
    if s.phase == "step" and s.speed.checkpointing != "all":
        return "checkpointing"
    return "block" if s.data.block_size // 2 >= _SHORTEST_BLOCK else None


def _lighter_state(s: Situation) -> str | None:
    """Less for the optimizer: the batch has no part in it, and before training it takes nothing."""
    if s.phase not in ("step", "optimizer"):
        return None
    if s.gpu and not s.model.optimizer.eight_bit:
        return "model.optimizer.eight_bit true"
    return "model.method lora" if s.model.method == "full" else None


_LAST_RESORT = "a smaller model, or a device with more memory"


def _least_factor(number: int) -> int:
    """Smallest divisor above 1, by which a batch is cut so that accumulation makes up for it, of text exactly."""
    return next(factor for factor in range(2, number + 1) if number % factor == 0)
