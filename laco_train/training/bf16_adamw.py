"""AdamW for bfloat16 weights that loses no small update (issue 5, Speed).

An update below half the spacing of bfloat16 (2^-9 of a weight) vanishes when rounded to the nearest. Here the weight is
rounded stochastically, so that updates survive in the mean, or kept exactly: the 16 bits of the float32 weight that
bfloat16 drops are a state of their own. Moments are bfloat16, rounded stochastically.
"""

import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from laco_train.training.parallel import first_element, local

_STATES = ("exp_avg", "exp_avg_sq", "low")


class BF16AdamW(torch.optim.Optimizer):
    """AdamW with decoupled decay on bfloat16 parameters, one fused pass over memory on a GPU with Triton.

    Before a step, ``grad_scale`` (a tensor to divide gradients by) and ``found_inf`` (a tensor; the step is left out
    unless 0) may be set, as for torch's fused AdamW: neither makes the host wait. Rounding is a function of seed,
    parameter, step and element of the whole parameter: a resumed run repeats it, and so does one that is sharded.

    Args:
        params: parameters or groups of them.
        lr, betas, eps, weight_decay: as torch.optim.AdamW.
        exact: keep the dropped bits (2 bytes a parameter) instead of rounding stochastically.
        seed: of the rounding; kept in checkpoints.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        exact: bool,
        seed: int = 0,
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "seed": seed}
        defaults["capturable"] = True  # torch then leaves the step count on the device when a state is loaded
        super().__init__(params, defaults)
        self.exact = exact

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what `closure` gives."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not parameters:
            return loss
        device = local(parameters[0][1]).device
        zero, one = (torch.tensor(value, dtype=torch.float32, device=device) for value in (0.0, 1.0))
        found = zero if self.found_inf is None else self.found_inf.to(device, torch.float32).reshape(())
        scale = one if self.grad_scale is None else self.grad_scale.to(device, torch.float32).reshape(())
        steps = [self._state(p)["step"] for _, p in parameters]
        torch._foreach_add_(steps, torch.where(found == 0, one, zero))
        for number, (group, p) in enumerate(parameters):
            tensors = {name: local(value) for name, value in self._state(p).items() if name in _STATES}
            salt = number + group["seed"] * 0x85EBCA6B & 0x7FFFFFFF
            update(local(p), local(p.grad), tensors, steps[number], scale, found, group, salt, first_element(p))
        return loss

    def _state(self, p: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=local(p).device)
            # the dropped bits pose as bfloat16, as torch casts every state to the parameter's type when it loads one
            for name in _STATES if self.exact and p.dtype == torch.bfloat16 else _STATES[:2]:
                state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state


def has_triton() -> bool:
    """Whether kernels written in Triton can be compiled here."""
    return importlib.util.find_spec("triton") is not None


def update(
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
    """One AdamW step in float32, in place; nothing changes unless `found_inf` is 0.

    Args:
        p, grad: weights and their gradient; what is not bfloat16 (norms of some families) is not rounded.
        states: exp_avg and exp_avg_sq; with ``low``, the weights' dropped bits.
        step: number of this step, from 1, a float32 scalar.
        scale: gradients are divided by it.
        group: lr, betas, eps, weight_decay.
        salt: makes the rounding of this parameter its own; 0 to 2^31 - 1.
        start: which element of the whole parameter is the first of `p`.
    """
    if p.numel() == 0:  # a rank's share of a small sharded parameter
        return
    if p.is_cuda and p.dtype == torch.bfloat16 and has_triton() and p.is_contiguous() and grad.is_contiguous():
        from laco_train.training.bf16_adamw_kernel import fused_update  # needs Triton

        fused_update(p, grad, states, step, scale, found_inf, group, salt, start)
        return
    beta1, beta2 = group["betas"]
    low = states["low"].view(torch.int16) if "low" in states else None
    m, v = states["exp_avg"], states["exp_avg_sq"]
    g = grad.float() / scale
    new_m = torch.lerp(m.float(), g, 1 - beta1)
    new_v = torch.lerp(v.float(), g * g, 1 - beta2)
    weight = joined(p, low) * (1 - group["lr"] * group["weight_decay"])
    denominator = (new_v / (1 - beta2**step)).sqrt() + group["eps"]
    weight = weight - group["lr"] / (1 - beta1**step) * (new_m / denominator)
    skip = found_inf != 0
    if p.dtype != torch.bfloat16:
        for old, new in ((m, new_m), (v, new_v), (p, weight)):
            old.copy_(torch.where(skip, old, new.to(old.dtype)))
        return
    noise = random_bits(p.numel(), step, salt, p.device, start).view(p.shape)
    m.copy_(torch.where(skip, m, rounded(new_m, noise >> 16)))
    v.copy_(torch.where(skip, v, rounded(new_v, scrambled(noise))))
    if low is None:
        p.copy_(torch.where(skip, p, rounded(weight, noise)))
    else:
        high, rest = split(weight)
        p.copy_(torch.where(skip, p, high))
        low.copy_(torch.where(skip, low, rest))


def split(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float32 to its nearest bfloat16 and the int16 that `joined` adds back: no bit of a number is lost."""
    bits = _bits(weight)
    high = (bits + 0x8000) >> 16
    low = bits - (high << 16)
    return (high << 16).to(torch.int32).view(torch.float32).to(torch.bfloat16), low.to(torch.int16)


def joined(high: Tensor, low: Tensor | None) -> Tensor:
    """The float32 of a bfloat16 and its dropped bits."""
    weight = high.float()
    return weight if low is None else (weight.view(torch.int32) + low.to(torch.int32)).view(torch.float32)


def rounded(value: Tensor, noise: Tensor) -> Tensor:
    """float32 to bfloat16, up with the probability of the part dropped: its mean is `value`.

    Args:
        noise: random integers of which the low 16 bits count.
    """
    bits = _bits(value) + (noise & 0xFFFF)
    return (bits & ~0xFFFF).to(torch.int32).view(torch.float32).to(torch.bfloat16)


def _bits(value: Tensor) -> Tensor:
    # the NaN that GPUs make has all bits set: what is added would carry into the sign and make it a 0
    return torch.where(value.isnan(), 0x7FC00000, value.view(torch.int32).to(torch.int64))


def random_bits(count: int, step: Tensor, salt: int, device: torch.device, start: int = 0) -> Tensor:
    """`count` numbers of 32 random bits, int64, a function of (step, salt, position); the first position is `start`."""
    seed = scrambled(step.to(torch.int64) * 0x9E3779B1 + salt & 0xFFFFFFFF)
    return scrambled(torch.arange(start, start + count, device=device) & 0xFFFFFFFF ^ seed)


def scrambled(x: Tensor) -> Tensor:
    """A hash of 32 bits to 32 bits (C. Wellons' lowbias32), of int64 below 2^32."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)
