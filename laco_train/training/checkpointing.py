"""Activation checkpointing of as many layers as memory asks for, found by measuring (issue 5, Speed)."""

from collections.abc import Callable

import torch
from torch import nn

from laco_train.collapse import decoder_of
from laco_train.training.loss import base_of

# What the allocator loses to fragments, and what kernels ask for beside it.
_USABLE = 0.94


def fewest_layers(depth: int, peak_of: Callable[[int], int], usable: int) -> int:
    """How many layers must recompute so that a step's peak stays within `usable` bytes, by halving.

    The peak falls with that number, but in no straight line: while few layers keep their activations it may lie
    elsewhere, as in the loss.

    Args:
        depth: number of layers.
        peak_of: peak bytes of a step if so many layers recompute; may raise torch.OutOfMemoryError.

    Raises:
        torch.OutOfMemoryError: even with all of them.
    """
    if _fits(0, peak_of, usable):
        return 0
    too_few, enough = 0, depth
    if peak_of(depth) > usable:
        return depth
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if _fits(middle, peak_of, usable):
            enough = middle
        else:
            too_few = middle
    return enough


def _fits(layers: int, peak_of: Callable[[int], int], usable: int) -> bool:
    try:
        return peak_of(layers) <= usable
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return False


def usable_bytes(device: torch.device) -> int:
    """Bytes of the GPU that this process may fill: its share, less what others hold."""
    free, total = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_reserved(device)
    share = torch.cuda.get_per_process_memory_fraction(device)
    return int(_USABLE * min(free + own, share * total))


def measured_layers(
    model: nn.Module,
    arrange: Callable[[int], None],
    step: Callable[[], None],
    optimizer_bytes: int,
    batches: int,
    device: torch.device,
) -> int:
    """Fewest layers of `model` that must recompute on the GPU `device`.

    Args:
        arrange: lets so many layers recompute.
        step: a forward and a backward pass on a batch as training has them; it leaves gradients.
        optimizer_bytes: of the optimizer's states, which don't exist yet.
        batches: that are accumulated to a step.
    """
    depth = len(decoder_of(base_of(model)).stack)
    usable = usable_bytes(device)
    reserve = torch.empty(optimizer_bytes, dtype=torch.uint8, device=device)

    def peak_of(layers: int) -> int:
        arrange(layers)
        torch.cuda.reset_peak_memory_stats(device)
        try:
            for _ in range(min(batches, 2)):  # from the second on, gradients are there beside the activations
                step()
            return torch.cuda.max_memory_allocated(device)
        finally:
            model.zero_grad(set_to_none=True)

    try:
        with torch.random.fork_rng(devices=[device]):
            layers = fewest_layers(depth, peak_of, usable)
    finally:
        del reserve
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return layers


def optimizer_bytes(model: nn.Module, *, eight_bit: bool, exact: bool) -> int:
    """Bytes of AdamW's states for the trainable parameters of `model`."""
    total = 0
    for p in model.parameters():
        if p.requires_grad:
            each = 2.1 if eight_bit else 2 * p.element_size() + (2 if exact and p.dtype == torch.bfloat16 else 0)
            total += int(each * p.numel())
    return total
