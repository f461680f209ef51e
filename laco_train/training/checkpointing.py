"""Activation checkpointing of as many layers as memory asks for, found by measuring (issue 5, Speed)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from laco_train.collapse import decoder_of
from laco_train.training.loss import base_of
from laco_train.training.parallel import local

# What the allocator loses to fragments, and what kernels ask for beside it.
_USABLE = 0.94


def fewest_layers(depth: int, peak: int, held: int, usable: int) -> int:
    """How many layers must recompute so that a step stays within `usable` bytes.

    At any moment a layer that keeps its activations adds at most those to what is there when all recompute, so the
    answer is on the safe side, and no trial has to run out of memory, which ranks in step could not survive.

    Args:
        depth: number of layers.
        peak: peak bytes of a step if all recompute.
        held: bytes of activations that one layer holds for the backward pass if it does not recompute.
    """
    keep = (usable - peak) // held if held > 0 else depth
    return depth - max(0, min(depth, keep))


def usable_bytes(device: torch.device) -> int:
    """Bytes of the GPU that this process may fill: its share, less what others hold."""
    free, total = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_reserved(device)
    share = torch.cuda.get_per_process_memory_fraction(device)
    return int(_USABLE * min(free + own, share * total))


def measured_layers(
    model: nn.Module,
    arrange: Callable[[int], None],
    forward: Callable[[], Tensor],
    optimizer_bytes: int,
    batches: int,
    device: torch.device,
) -> tuple[int, int]:
    """Fewest layers of `model` that must recompute on the GPU `device`, and the bytes that are then left there.

    Under DDP gradients of the trial lie beside those buckets that training puts them into: it errs on the safe side.

    Args:
        arrange: lets so many layers recompute.
        forward: loss of a batch as in training.
        optimizer_bytes: of the optimizer's states, which don't exist yet.
        batches: that are accumulated to a step.
    """
    depth = len(decoder_of(base_of(model)).stack)
    reserve = torch.empty(optimizer_bytes, dtype=torch.uint8, device=device)

    def after_forward(layers: int, times: int) -> int:
        """Bytes after the last of so many forward passes, each followed by a backward pass."""
        arrange(layers)
        for _ in range(times):
            loss = forward()
            held = torch.cuda.memory_allocated(device)
            loss.backward()
        model.zero_grad(set_to_none=True)
        return held

    try:
        with torch.random.fork_rng(devices=[device]):
            after_forward(depth, 1)  # compiles, and makes what stays
            torch.cuda.reset_peak_memory_stats(device)
            # from the second batch on, gradients are there beside the activations
            after_forward(depth, min(batches, 2))
            peak = torch.cuda.max_memory_allocated(device)
            held = after_forward(depth - 1, 1) - after_forward(depth, 1)
    finally:
        del reserve
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    usable = usable_bytes(device)
    layers = fewest_layers(depth, peak, held, usable)
    return layers, usable - peak - (depth - layers) * held


def optimizer_bytes(model: nn.Module, *, eight_bit: bool, exact: bool) -> int:
    """Bytes of AdamW's states for the trainable parameters of `model`, or for this rank's shards of them."""
    total = 0
    for p in model.parameters():
        if p.requires_grad:
            each = 2.1 if eight_bit else 2 * p.element_size() + (2 if exact and p.dtype == torch.bfloat16 else 0)
            total += int(each * local(p).numel())
    return total
