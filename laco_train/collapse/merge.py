"""Merge rules: parameter arithmetic on layers of equal parameter names and shapes.

A rule gets layer l's tensor and those of the m layers after it, and returns the merged tensor. Arithmetic is in
float32 and each merge is rounded once to the model's dtype. A new rule is one function and one line in RULES.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

# Elements merged at a time: bounds the float32 working copy to 64 MiB, whatever the size of a layer.
_CHUNK = 1 << 24

Rule = Callable[[Tensor, Sequence[Tensor]], Tensor]


def rdsc(base: Tensor, rest: Sequence[Tensor]) -> Tensor:
    """theta_l + sum_k (theta_{l+k} - theta_l): reserve differences, seek common (arXiv 2402.11187, eq. 1)."""
    base = base.float()
    total = base.clone()
    for other in rest:
        total += other.float() - base
    return total


def last(base: Tensor, rest: Sequence[Tensor]) -> Tensor:
    """theta_{l+m}: what the published code computes, whose loop telescopes (LaCo issues #4, #5)."""
    return rest[-1].float()


def mean(base: Tensor, rest: Sequence[Tensor]) -> Tensor:
    """The average of all m + 1 layers."""
    total = base.float().clone()
    for other in rest:
        total += other.float()
    return total / (len(rest) + 1)


RULES: dict[str, Rule] = {"rdsc": rdsc, "last": last, "mean": mean}
_FUSED = ("rdsc", "mean")  # the rules that merge_kernel knows
DROP = "drop"  # no arithmetic: layer l stays as it is and the others go
FITTED = "fitted"  # no arithmetic: the merged layer is trained, and its weights come in a file
COMPOSED = "composed"  # no arithmetic: a plan of several rounds, with training between them


def is_norm(module: nn.Module) -> bool:
    """Whether `module` is a normalisation layer (LayerNorm, RMSNorm and their kin), by its class name."""
    return "norm" in type(module).__name__.lower()


def merged_names(layer: nn.Module, merge_norms: bool) -> list[str]:
    """Names of the parameters of `layer` that a merge joins: all but those of norms, or all."""
    owners = dict(layer.named_modules())
    names = [name for name, _ in layer.named_parameters()]
    return [name for name in names if merge_norms or not is_norm(owners[name.rpartition(".")[0]])]


def _fusible(base: Tensor, rest: Sequence[Tensor]) -> bool:
    has_triton = base.is_cuda and importlib.util.find_spec("triton") is not None
    return has_triton and len(rest) <= 7 and all(t.is_contiguous() for t in (base, *rest))


def merge_tensors(rule: str, base: Tensor, rest: Sequence[Tensor]) -> Tensor:
    """Merge tensors of one shape by `rule`, rounding once to the dtype of `base`; little memory beside the result."""
    if rule == "last":
        return rest[-1].detach().clone()
    if rule in _FUSED and _fusible(base, rest):
        from laco_train.collapse.merge_kernel import fused_sum  # needs Triton, which only GPU machines have

        return fused_sum(rule, base, rest)
    merged = torch.empty_like(base, memory_format=torch.contiguous_format)
    flat, parts = merged.view(-1), [t.detach().reshape(-1) for t in (base, *rest)]
    for start in range(0, flat.numel(), _CHUNK):
        piece = [part[start : start + _CHUNK] for part in parts]
        flat[start : start + _CHUNK] = RULES[rule](piece[0], piece[1:])
    return merged


def merge_weights(rule: str, weights: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> dict[str, Tensor]:
    """The merged tensors `names` of the layers `weights` (layer l first); empty for ``drop`` and ``fitted``."""
    if rule in (DROP, FITTED):
        return {}
    base, rest = weights[0], weights[1:]
    return {name: merge_tensors(rule, base[name].detach(), [other[name] for other in rest]) for name in names}
