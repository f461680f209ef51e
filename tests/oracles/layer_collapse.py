"""Algorithm 1 of arXiv 2402.11187 as printed: a deep copy of the whole model and full forwards for every candidate.

Layers count from 1 inside `layer_collapse`, as in the paper; whatever it returns counts from 0.
"""

import copy
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Candidate:
    """One merge that was tried: `absorbed` layers after `layer` (from 0, in the model as it then stood)."""

    layer: int
    absorbed: int
    similarity: float
    accepted: bool


@dataclass(frozen=True)
class Collapsed:
    """What the algorithm ends with; `lineage` gives the original indices behind each surviving layer."""

    model: nn.Module
    candidates: list[Candidate]
    lineage: list[list[int]]

    @property
    def merges(self) -> list[Candidate]:
        """Accepted candidates, in order."""
        return [c for c in self.candidates if c.accepted]


def is_norm(name: str) -> bool:
    """Whether a decoder layer's parameter belongs to a norm (Llama: input_layernorm, post_attention_layernorm)."""
    return "norm" in name


@torch.no_grad()
def final_states(model: nn.Module, samples: list[torch.Tensor]) -> list[torch.Tensor]:
    """Hidden states after the final norm, float32, [tokens * hidden] for each sample of [tokens] ids, run alone."""
    return [model.model(input_ids=ids[None], use_cache=False).last_hidden_state.float().flatten() for ids in samples]


def similarity(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """Mean over samples of the cosine between flattened final states."""
    cosines = [float(torch.cosine_similarity(x.double(), y.double(), dim=0)) for x, y in zip(a, b, strict=True)]
    return sum(cosines) / len(cosines)


def merged(rule: str, first: torch.Tensor, rest: list[torch.Tensor]) -> torch.Tensor:
    """One parameter of the merged layer, computed in float32 and rounded once to the dtype of `first`."""
    theta = first.float()
    if rule == "rdsc":
        result = sum((other.float() - theta for other in rest), theta)
    elif rule == "last":
        result = rest[-1].float()
    elif rule == "mean":
        result = sum((other.float() for other in rest), theta) / (1 + len(rest))
    else:
        assert rule == "drop", rule
        result = theta
    return result.to(first.dtype)


@torch.no_grad()
def merge_layers(model: nn.Module, first: int, count: int, rule: str, merge_norms: bool) -> nn.Module:
    """A copy of `model` whose layer `first` (from 0) has the `count` layers after it merged in, and those removed."""
    source = model.model.layers
    result = copy.deepcopy(model)
    layers = result.model.layers
    others = [dict(source[first + k].named_parameters()) for k in range(1, count + 1)]
    for name, parameter in layers[first].named_parameters():
        if merge_norms or not is_norm(name):
            parameter.copy_(merged(rule, parameter, [other[name] for other in others]))
    return without(result, list(range(first + 1, first + count + 1)))


def without(model: nn.Module, removed: list[int]) -> nn.Module:
    """A copy of `model` without these layers, counted from 0."""
    result = copy.deepcopy(model)
    result.model.layers = nn.ModuleList(x for i, x in enumerate(result.model.layers) if i not in removed)
    for index, layer in enumerate(result.model.layers):
        layer.self_attn.layer_idx = index
    result.config.num_hidden_layers = len(result.model.layers)
    return result


def layer_collapse(
    original: nn.Module,
    samples: list[torch.Tensor],
    *,
    C: int,
    L: int,
    H: int,
    I: int,  # noqa: E741
    T: float,
    rule: str = "rdsc",
    merge_norms: bool = False,
    fewest: int = 1,
) -> Collapsed:
    """Algorithm 1; `samples` are token ids of shape [tokens], the letters are the paper's (l, L and H from 1).

    `fewest` is not the paper's: no merge may leave fewer layers, and the search ends when they are reached.
    """
    reference = final_states(original, samples)
    model = copy.deepcopy(original)
    lineage = [[i] for i in range(len(original.model.layers))]
    candidates = []
    l = H - C  # noqa: E741
    while l >= L and len(model.model.layers) > fewest:
        K = min(C - 1, len(model.model.layers) - l, len(model.model.layers) - fewest)
        attempt = merge_layers(model, l - 1, K, rule, merge_norms)
        s = similarity(final_states(attempt, samples), reference)
        candidates.append(Candidate(l - 1, K, s, s > T))
        if s > T:
            model = attempt
            lineage[l - 1 : l + K] = [[i for part in lineage[l - 1 : l + K] for i in part]]
            l -= I  # noqa: E741
            if l > len(model.model.layers) - C:
                l = len(model.model.layers) - C  # noqa: E741
        else:
            l -= 1  # noqa: E741
    return Collapsed(model, candidates, lineage)
