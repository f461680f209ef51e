"""`laco_train.training.bf16_adamw.update` in one pass over memory (equal to it up to rounding: benchmarks/train.py)."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048


@triton.jit
def _scrambled(x):  # type: ignore[no-untyped-def]  # x: uint32
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _bits(value):  # type: ignore[no-untyped-def]
    # the NaN that GPUs make has all bits set: what is added would carry into the sign and make it a 0
    return tl.where(value == value, value.to(tl.uint32, bitcast=True), 0x7FC00000)


@triton.jit
def _rounded(value, noise):  # type: ignore[no-untyped-def]
    bits = _bits(value) + (noise & 0xFFFF)
    return (bits & 0xFFFF0000).to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit(do_not_specialize=["salt", "start"])
def _update_kernel(  # type: ignore[no-untyped-def]
    p, grad, m, v, low, step, scale, found_inf, lr, decay, beta1, beta2, eps, salt, start, size,
    exact: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    if tl.load(found_inf) != 0:
        return
    offsets = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = offsets < size
    steps = tl.load(step)
    g = tl.load(grad + offsets, mask=inside).to(tl.float32) / tl.load(scale)
    old_m = tl.load(m + offsets, mask=inside).to(tl.float32)
    old_v = tl.load(v + offsets, mask=inside).to(tl.float32)
    weight = tl.load(p + offsets, mask=inside).to(tl.float32)
    if exact:
        dropped = tl.load(low + offsets, mask=inside).to(tl.int32)
        weight = (weight.to(tl.int32, bitcast=True) + dropped).to(tl.float32, bitcast=True)
    new_m = old_m + (g - old_m) * (1 - beta1)
    new_v = old_v + (g * g - old_v) * (1 - beta2)
    correction1 = 1 - tl.exp2(steps * tl.log2(beta1))
    correction2 = 1 - tl.exp2(steps * tl.log2(beta2))
    weight = weight * decay - lr / correction1 * (new_m / (tl.sqrt(new_v / correction2) + eps))
    seed = _scrambled(steps.to(tl.uint32) * 0x9E3779B1 + salt.to(tl.uint32))
    noise = _scrambled((offsets + start).to(tl.uint32) ^ seed)
    tl.store(m + offsets, _rounded(new_m, noise >> 16), mask=inside)
    tl.store(v + offsets, _rounded(new_v, _scrambled(noise)), mask=inside)
    if exact:
        bits = _bits(weight)
        high = (bits + 0x8000) & 0xFFFF0000
        tl.store(p + offsets, high.to(tl.float32, bitcast=True).to(tl.bfloat16), mask=inside)
        tl.store(low + offsets, (bits - high).to(tl.int16), mask=inside)
    else:
        tl.store(p + offsets, _rounded(weight, noise), mask=inside)


def fused_update(
    p: Tensor,
    grad: Tensor,
    states: dict[str, Tensor],
    step: Tensor,
    scale: Tensor,
    found_inf: Tensor,
    group: dict[str, Any],
    salt: int,
    start: int = 0,
) -> None:
    """See `laco_train.training.bf16_adamw.update`; contiguous tensors on one GPU."""
    beta1, beta2 = group["betas"]
    exact = "low" in states
    low = states["low"].view(torch.int16) if exact else p
    size = p.numel()
    with torch.cuda.device(p.device):
        _update_kernel[(triton.cdiv(size, _BLOCK),)](
            p, grad, states["exp_avg"], states["exp_avg_sq"], low, step, scale, found_inf,
            float(group["lr"]), 1 - float(group["lr"]) * group["weight_decay"], float(beta1), float(beta2),
            float(group["eps"]), salt, start, size, exact=exact, block=_BLOCK, num_warps=8,
        )  # fmt: skip
