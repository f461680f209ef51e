"""The sum of `rdsc` and `mean` in one pass over memory on a GPU: no float32 copy of a layer.

Same float32 operations in the same order as the functions in `merge`, so the bits are the same (tested on a GPU by
benchmarks/search.py).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_OTHERS = 7
_BLOCK = 4096


@triton.jit
def _sum_kernel(  # type: ignore[no-untyped-def]  # Triton reads the annotations
    out, base, o1, o2, o3, o4, o5, o6, o7, size, others: tl.constexpr, rdsc: tl.constexpr, block: tl.constexpr
):
    offsets = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = offsets < size
    first = tl.load(base + offsets, mask=inside).to(tl.float32)
    pointers = (o1, o2, o3, o4, o5, o6, o7)
    total = first
    for k in tl.static_range(others):
        other = tl.load(pointers[k] + offsets, mask=inside).to(tl.float32)
        total += other - first if rdsc else other
    if not rdsc:
        total = total / (others + 1.0)
    tl.store(out + offsets, total.to(out.dtype.element_ty), mask=inside)


def fused_sum(rule: str, base: Tensor, rest: Sequence[Tensor]) -> Tensor:
    """`rdsc` or `mean` of contiguous tensors of one shape on a GPU, rounded once to the dtype of `base`."""
    out = torch.empty_like(base)
    pointers = [*rest, *[base] * (MOST_OTHERS - len(rest))]
    size = base.numel()
    grid = (triton.cdiv(size, _BLOCK),)
    _sum_kernel[grid](out, base, *pointers, size, others=len(rest), rdsc=rule == "rdsc", block=_BLOCK, num_warps=8)
    return out
