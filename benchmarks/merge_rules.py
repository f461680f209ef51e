"""Merge arithmetic for Llama-like decoder layers: a window of them becomes weights for its first layer.

A layer is its parameters by name. Nothing in it tells its key-value groups apart, nor the query heads of a group, nor
the neurons of its MLP: each of these can be permuted, rows and columns together, without any change of what the layer
does. The merged layer keeps the norms of the window's first. *Folded* means that rows of a later layer that read from
its norm are scaled by w_later / w_first, so that behind the first's norm they do what they did behind their own.
SciPy does the assignment; the extra `dev` brings it.

Shapes: D hidden size, G key-value groups, P query heads of a group, H size of a head, I neurons of the MLP.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from laco_train.collapse import decoder_of
from laco_train.collapse.merge import RULES as PLAIN
from laco_train.collapse.merge import merge_weights
from laco_train.errors import InputError

Parts = dict[str, Tensor]
QUERY, GROUP, NEURON = "query", "group", "neuron"
ATTENTION_NORM, MLP_NORM = "input_layernorm.weight", "post_attention_layernorm.weight"
# Of each matrix: what its units are, along which axis, and the norm that its rows read from.
MATRICES: dict[str, tuple[str, int, str | None]] = {
    "self_attn.q_proj.weight": (QUERY, 0, ATTENTION_NORM),
    "self_attn.k_proj.weight": (GROUP, 0, ATTENTION_NORM),
    "self_attn.v_proj.weight": (GROUP, 0, ATTENTION_NORM),
    "self_attn.o_proj.weight": (QUERY, 1, None),
    "mlp.gate_proj.weight": (NEURON, 0, MLP_NORM),
    "mlp.up_proj.weight": (NEURON, 0, MLP_NORM),
    "mlp.down_proj.weight": (NEURON, 1, None),
}
BIASES: dict[str, tuple[str, int, str | None]] = {
    f"self_attn.{name}_proj.bias": (QUERY if name == "q" else GROUP, 0, None) for name in "qkv"
}
UNITS = {**MATRICES, **BIASES}


@dataclass(frozen=True)
class Heads:
    """G groups of P query heads, each of size H."""

    groups: int
    queries: int
    size: int


@dataclass(frozen=True)
class Contribution:
    """What a layer does to the original's states.

    Attributes:
        influence: 1 minus the mean cosine of a token's states that enter and leave it (ShortGPT, arXiv 2403.03853).
        groups: (G,) mean square of what each adds through the output projection, relative to the leaving state's.
        neurons: (I,) the same of each neuron, through the down projection.
    """

    influence: float
    groups: Tensor
    neurons: Tensor


@dataclass(frozen=True)
class Given:
    """What a rule may use: the window's layers, first to last, what each contributes, heads, rank of `low_rank`."""

    layers: Sequence[Parts]
    contributions: Sequence[Contribution]
    heads: Heads
    rank: int


def heads_of(config: Any) -> Heads:
    """Of a config with grouped key-value heads."""
    groups = config.num_key_value_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Heads(groups, config.num_attention_heads // groups, size)


def parts_of(layer: nn.Module) -> Parts:
    """The layer's parameters by name."""
    return {name: weight.detach() for name, weight in layer.named_parameters()}


def refuse_unlike_llama(model: Any, windows: Sequence[range]) -> None:
    """InputError unless the layers of each window are of one kind, with Llama's parameters and Llama's norms."""
    decoder = decoder_of(model)
    for window in windows:
        for at in window:
            names = {name for name, _ in decoder.stack[at].named_parameters()}
            if not {*MATRICES, ATTENTION_NORM, MLP_NORM} <= names <= {*UNITS, ATTENTION_NORM, MLP_NORM}:
                raise InputError("model", f"layer {at} of this {model.config.model_type} has other parts than Llama's")
            if decoder.layer_type(at) != decoder.layer_type(window[0]):
                raise InputError("--windows", f"layers {window[0]} and {at} are of different kinds")
            for norm in (ATTENTION_NORM, MLP_NORM):
                if not _only_scales(decoder.stack[at].get_submodule(norm.removesuffix(".weight"))):
                    raise InputError("model", f"{norm} of layer {at} does more than scale, and can't be folded")


@torch.no_grad()
def _only_scales(norm: Any) -> bool:
    """Whether `norm` gives a multiple of weight x input, which Gemma's and LayerNorm don't."""
    x = torch.randn(norm.weight.shape, generator=torch.Generator().manual_seed(0)).to(norm.weight)
    out, plain = norm(x[None])[0].float(), (norm.weight * x).float()
    return bool((out - plain * (out @ plain / (plain @ plain))).norm() < 1e-2 * out.norm())


def folded(parts: Parts, first: Parts) -> Parts:
    """`parts` as they must be behind the norms of `first`; a feature that those shut out stays out."""
    scales = {name: _ratio(parts[name], first[name]) for name in (ATTENTION_NORM, MLP_NORM)}
    read = {name: parts[name] * scales[norm] for name, (_, _, norm) in MATRICES.items() if norm is not None}
    return {**parts, **read, ATTENTION_NORM: first[ATTENTION_NORM], MLP_NORM: first[MLP_NORM]}


def _ratio(later: Tensor, first: Tensor) -> Tensor:
    return torch.where(first == 0, torch.zeros_like(later), later / first)


def taken(parts: Parts, queries: Tensor, groups: Tensor, neurons: Tensor, size: int) -> Parts:
    """The layer with these units alone, in this order.

    Args:
        queries, groups, neurons: int64 indices of query heads, of key-value groups and of neurons, of any length.
        size: H.
    """
    rows = {QUERY: _rows(queries, size), GROUP: _rows(groups, size), NEURON: neurons}
    found = {n: parts[n].index_select(axis, rows[unit]) for n, (unit, axis, _) in UNITS.items() if n in parts}
    return {**parts, **found}


def _rows(heads: Tensor, size: int) -> Tensor:
    return (heads[:, None] * size + torch.arange(size)).flatten()


def queries_of(groups: Tensor, queries: int) -> Tensor:
    """All query heads of `groups`, group after group."""
    return _rows(groups, queries)


def aligned(parts: Parts, first: Parts, heads: Heads) -> Parts:
    """The layer `parts`, folded, its groups, query heads and neurons in the order that comes nearest to `first`.

    Nearest: of least squared distance of all weights, norms folded in, which is the largest sum of inner products.
    """
    ours, theirs = _effective(first), _effective(parts)
    neurons = _assigned(_products(ours, theirs, NEURON, 1))[0]
    by_head = _products(ours, theirs, QUERY, heads.size)  # (G P, G P)
    pairs = _products(ours, theirs, GROUP, heads.size)  # (G, G) keys and values
    p = heads.queries
    inner: dict[tuple[int, int], Tensor] = {}
    for a in range(heads.groups):
        for b in range(heads.groups):
            inner[a, b], total = _assigned(by_head[a * p : (a + 1) * p, b * p : (b + 1) * p])
            pairs[a, b] += total
    groups = _assigned(pairs)[0]
    queries = torch.cat([b * p + inner[a, b] for a, b in enumerate(groups.tolist())])
    return folded(taken(parts, queries, groups, neurons, heads.size), first)


def _effective(parts: Parts) -> Parts:
    """Weights as they act on a normalised state of unit weight, (rows, columns) each; a bias is one more column."""
    found = {}
    for name, (_, _, norm) in MATRICES.items():
        found[name] = parts[name].float() * (1 if norm is None else parts[norm].float())
        bias = parts.get(name.replace(".weight", ".bias"))
        if bias is not None:
            found[name] = torch.cat([found[name], bias.float()[:, None]], 1)
    return found


def _products(ours: Parts, theirs: Parts, unit: str, size: int) -> Tensor:
    """(units, units) inner products of all that belongs to a unit of ours with all that belongs to one of theirs."""

    def flat(parts: Parts) -> Tensor:
        rows = [parts[n] if axis == 0 else parts[n].T for n, (kind, axis, _) in MATRICES.items() if kind == unit]
        return torch.cat([matrix.reshape(len(matrix) // size, -1) for matrix in rows], 1)

    return flat(ours) @ flat(theirs).T


def _assigned(gain: Tensor) -> tuple[Tensor, float]:
    """For each row the column, each column once, of largest total gain; and that total."""
    rows, columns = linear_sum_assignment(gain.double().numpy(), maximize=True)
    return torch.from_numpy(columns), float(gain[rows, columns].sum())


def influence_weights(contributions: Sequence[Contribution]) -> list[float]:
    """Each layer's share of the window's block influence."""
    total = sum(c.influence for c in contributions)
    return [c.influence / total for c in contributions]


def _plain(rule: str, layers: Sequence[Parts]) -> Parts:
    """By a rule of `laco_train.collapse.merge`."""
    return merge_weights(rule, layers, [name for name in UNITS if name in layers[0]])


def _plainly(rule: str) -> Callable[[Given], Parts]:
    return lambda given: _plain(rule, given.layers)


def _influence(given: Given) -> Parts:
    """Mean, weighted by block influence."""
    shares = influence_weights(given.contributions)
    names = [name for name in UNITS if name in given.layers[0]]
    return {name: sum(s * parts[name] for s, parts in zip(shares, given.layers, strict=True)) for name in names}


def _rdsc_norm(given: Given) -> Parts:
    """RDSC, each matrix of the Frobenius norm of the first layer's: what reads the first's norms keeps its size."""
    found = _plain("rdsc", given.layers)
    tiny = torch.finfo(torch.float32).tiny
    return {name: w * (given.layers[0][name].norm() / w.norm().clamp(min=tiny)) for name, w in found.items()}


def _low_rank(given: Given) -> Parts:
    """The first layer plus the best approximation of rank r of the sum of differences; biases as in RDSC."""
    found = _plain("rdsc", given.layers)
    for name in MATRICES:
        base = given.layers[0][name].float()
        u, s, v = torch.linalg.svd(found[name].float() - base, full_matrices=False)
        r = given.rank
        found[name] = (base + (u[:, :r] * s[:r]) @ v[:r]).to(found[name].dtype)
    return found


def _aligned_by(rule: str) -> Callable[[Given], Parts]:
    def merge(given: Given) -> Parts:
        first = given.layers[0]
        return _plain(rule, [first, *(aligned(parts, first, given.heads) for parts in given.layers[1:])])

    return merge


def _select(given: Given) -> Parts:
    """Of all layers' groups, with their query heads, and of all their neurons those that contribute most."""
    first, heads = given.layers[0], given.heads
    layers = [folded(parts, first) for parts in given.layers]
    pool = {
        name: torch.cat([parts[name] for parts in layers], axis)
        for name, (_, axis, _) in UNITS.items()
        if name in first
    }
    groups = _best(torch.cat([c.groups for c in given.contributions]), heads.groups)
    neurons = _best(torch.cat([c.neurons for c in given.contributions]), len(first["mlp.gate_proj.weight"]))
    return taken(pool, queries_of(groups, heads.queries), groups, neurons, heads.size)


def _best(values: Tensor, count: int) -> Tensor:
    """Ascending indices of the `count` largest."""
    return values.topk(count).indices.sort().values


_FOLDED = "_folded"
_LINEAR: dict[str, Callable[[Given], Parts]] = {
    **{name: _plainly(name) for name in PLAIN},
    "rdsc_norm": _rdsc_norm,
    "influence": _influence,
    "low_rank": _low_rank,
}
RULES: dict[str, Callable[[Given], Parts]] = {
    "drop": lambda given: {},
    **_LINEAR,
    "aligned_mean": _aligned_by("mean"),
    "aligned_rdsc": _aligned_by("rdsc"),
    "select": _select,
}
NAMES = (*RULES, *(f"{name}{_FOLDED}" for name in _LINEAR))


def merge(rule: str, given: Given) -> Parts:
    """Weights that the window's first layer takes in place of its own; those that stay as they are may be left out.

    Args:
        rule: one of NAMES; NAME_folded is NAME with the later layers folded first.
    """
    if rule.endswith(_FOLDED):
        layers = [folded(parts, given.layers[0]) for parts in given.layers]
        given = Given(layers, given.contributions, given.heads, given.rank)
    return RULES[rule.removesuffix(_FOLDED)](given)
