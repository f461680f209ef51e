"""What the public notebooks of LaCo do: another merge than the paper's, and another walk. Layers count from 0."""

import copy

import torch
from torch import nn

from tests.oracles.layer_collapse import Candidate, Collapsed, final_states, similarity, without

PROJECTIONS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


@torch.no_grad()
def published_merge(model: nn.Module, first: int, count: int) -> nn.Module:
    """The loop that reads the copy it has already updated, so that each pass undoes the one before."""
    result = copy.deepcopy(model)
    count = min(count, len(model.model.layers) - first - 1)
    for k in range(first + 1, first + 1 + count):
        for name in PROJECTIONS:
            target = result.model.layers[first].get_submodule(name).weight
            target.add_(model.model.layers[k].get_submodule(name).weight - target)
    return without(result, list(range(first + 1, first + 1 + count)))


def published_collapse(
    original: nn.Module, samples: list[torch.Tensor], *, C: int, L: int, H: int, interval: int, T: float
) -> Collapsed:
    """The notebooks' search; L and H count from 0 here (their H = 39, L = 0 for 40 layers is the paper's 40 and 1)."""
    reference = final_states(original, samples)
    model = copy.deepcopy(original)
    lineage = [[i] for i in range(len(original.model.layers))]
    candidates = []
    lay = H - C
    while lay >= L:
        depth = len(model.model.layers)
        attempt = published_merge(model, lay, C - 1)
        s = similarity(final_states(attempt, samples), reference)
        absorbed = depth - len(attempt.model.layers)
        candidates.append(Candidate(lay, absorbed, s, s > T))
        if s > T:
            model = attempt
            window = lineage[lay : lay + absorbed + 1]
            lineage[lay : lay + absorbed + 1] = [[i for part in window for i in part]]
            lay -= interval
            depth = len(model.model.layers)
            if lay >= depth:
                lay = depth - 1 - C
        else:
            lay -= 1
    return Collapsed(model, candidates, lineage)
