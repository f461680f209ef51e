"""How fast the device multiplies matrices: what training speed is compared with."""

import time

import torch

_LARGEST, _CPU_SIZE = 8192, 768  # at 8192 the rate of large GPUs has levelled off
_ROUNDS, _ROUND_SECONDS = 5, 0.02


def arithmetic_dtype(precision: str) -> torch.dtype:
    """Type in which products are computed under Lightning's `precision`."""
    if precision.startswith("bf16"):
        return torch.bfloat16
    return torch.float16 if precision.startswith("16") else torch.float32


def matmul_rate(device: torch.device, dtype: torch.dtype = torch.float32, size: int | None = None) -> float:
    """Floating-point operations per second of a square product, the best of several rounds of 0.02 s or more.

    Leaves no memory allocated and the random state as it was; the peak of allocated memory may rise.

    Args:
        device: a CPU or a CUDA device.
        dtype: type of the matrices.
        size: their rows and columns; None: 768 on the CPU, on a GPU 8192, or less where memory is short.
    """
    size = size or (_cuda_size(device, dtype) if device.type == "cuda" else _CPU_SIZE)
    generator = torch.Generator(device).manual_seed(0)  # random: constants would draw less power and clock higher
    a = torch.randn(size, size, generator=generator, device=device, dtype=dtype)
    out = torch.empty_like(a)
    _seconds(a, out, 1)  # the first loads the kernel
    products = max(1, round(_ROUND_SECONDS / _seconds(a, out, 1)))
    best = min(_seconds(a, out, products) for _ in range(_ROUNDS)) / products
    del a, out
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return 2 * size**3 / best


def _seconds(a: torch.Tensor, out: torch.Tensor, products: int) -> float:
    if a.device.type != "cuda":
        began = time.perf_counter()
        for _ in range(products):
            torch.mm(a, a, out=out)
        return time.perf_counter() - began
    with torch.cuda.device(a.device):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        for _ in range(products):
            torch.mm(a, a, out=out)
        last.record()
        last.synchronize()
    return first.elapsed_time(last) / 1000


def _cuda_size(device: torch.device, dtype: torch.dtype) -> int:
    """The largest power of 2 whose two matrices fit in a quarter of what is free."""
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    room = (torch.cuda.mem_get_info(device)[0] + cached) // 4
    size = _LARGEST
    while size > 256 and 2 * size * size * dtype.itemsize > room:
        size //= 2
    return size
