"""The other ways to choose layers, slowly: cut copies of a Llama and full forwards, one sample at a time.

`samples` are token ids of shape [tokens]; layers count from 0.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from tests.oracles.layer_collapse import final_states, layer_collapse, merge_layers, similarity, without

Samples = list[torch.Tensor]


@torch.no_grad()
def residual(model: nn.Module, layers: int, ids: torch.Tensor) -> torch.Tensor:
    """[tokens, hidden] after the first `layers` layers, before any final norm: a model cut there, its norm gone."""
    cut = without(model, list(range(layers, len(model.model.layers))))
    cut.model.norm = nn.Identity()
    return cut.model(input_ids=ids[None], use_cache=False).last_hidden_state[0]


def cosines(model: nn.Module, size: int, samples: Samples) -> list[list[torch.Tensor]]:
    """For each block of `size` layers, for each sample, [tokens]: cosine between what enters and what leaves."""
    depth = len(model.model.layers)
    states = [[residual(model, layers, ids) for ids in samples] for layers in range(depth + 1)]
    return [
        [
            (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
            for x, y in zip(states[first], states[first + size], strict=True)
        ]
        for first in range(depth + 1 - size)
    ]


def block_influences(model: nn.Module, samples: Samples) -> list[float]:
    """ShortGPT, eq. 1, for each layer."""
    return [1 - cosine for cosine in block_cosines(model, 1, samples)]


def angular_distances(model: nn.Module, size: int, samples: Samples) -> list[float]:
    """Arccos over pi at the last token, averaged over samples, for each first layer of a block of `size`."""
    angles = [[math.acos(float(c[-1])) / math.pi for c in block] for block in cosines(model, size, samples)]
    return [sum(values) / len(values) for values in angles]


def block_cosines(model: nn.Module, size: int, samples: Samples) -> list[float]:
    """Mean cosine over all tokens for each first layer of a block of `size`."""
    return [float(torch.cat(block).mean()) for block in cosines(model, size, samples)]


@torch.no_grad()
def loss(model: nn.Module, samples: Samples) -> float:
    """Nats per predicted token, by the loss that the model itself computes for each sample."""
    long = [ids for ids in samples if len(ids) > 1]
    sums = [float(model(input_ids=ids[None], labels=ids[None]).loss) * (len(ids) - 1) for ids in long]
    return sum(sums) / sum(len(ids) - 1 for ids in long)


@dataclass(frozen=True)
class Removed:
    """A greedy removal: original indices in the order in which they went, and the losses tried at each step."""

    order: list[int]
    losses: list[list[float]]


def sleb(model: nn.Module, samples: Samples, target: int) -> Removed:
    """SLEB: each step tries every layer that is left."""
    left = list(range(len(model.model.layers)))
    order: list[int] = []
    tried: list[list[float]] = []
    while len(left) > target:
        losses = [loss(without(model, [*order, layer]), samples) for layer in left]
        tried.append(losses)
        order.append(left.pop(losses.index(min(losses))))
    return Removed(order, tried)


@dataclass(frozen=True)
class Window:
    """A merge that greedy tried, and what it would do to the whole model."""

    layer: int
    absorbed: int
    similarity: float
    loss: float


@dataclass(frozen=True)
class Greedy:
    """What greedy merging ends with; `steps` holds every window of each step, `taken` the accepted ones."""

    model: nn.Module
    steps: list[list[Window]]
    taken: list[Window]


def greedy(
    original: nn.Module,
    samples: Samples,
    *,
    C: int,
    lowest: int,
    highest: int,
    rule: str,
    criterion: str,
    target: int | None,
    T: float,
    exact: bool,
) -> Greedy:
    """Best window first; windows hold layers lowest to highest - 1, counted from 1 in the original."""
    reference = final_states(original, samples)
    model = copy.deepcopy(original)
    above = len(original.model.layers) - (highest - 1)  # layers at the end that are never in a window
    steps: list[list[Window]] = []
    taken: list[Window] = []
    while target is None or len(model.model.layers) > target:
        depth = len(model.model.layers)
        windows = []
        for first in range(lowest - 1, depth):
            for size in range(2, C + 1):
                fits = first + size <= depth - above
                if fits and not (exact and target is not None and depth - (size - 1) < target):
                    attempt = merge_layers(model, first, size - 1, rule, merge_norms=False)
                    s = similarity(final_states(attempt, samples), reference)
                    windows.append(Window(first, size - 1, s, loss(attempt, samples)))
        if not windows:
            break
        steps.append(windows)
        rank: Callable[[Window], float] = {"similarity": lambda w: -w.similarity, "loss": lambda w: w.loss}[criterion]
        best = min(windows, key=rank)
        if target is None and not best.similarity > T:
            break
        taken.append(best)
        model = merge_layers(model, best.layer, best.absorbed, rule, merge_norms=False)
    return Greedy(model, steps, taken)


@dataclass(frozen=True)
class Fit:
    """A layer trained by `fit_layer`, and its mean squared error before and after."""

    layer: nn.Module
    before: float
    after: float


def fit_layer(model: nn.Module, first: int, size: int, samples: Samples, *, steps: int, rate: float) -> Fit:
    """Adam written out, on a copy of layer `first`, each sample alone through a model that holds nothing else."""
    lone = without(model, [i for i in range(len(model.model.layers)) if i != first])
    lone.model.norm = nn.Identity()
    entering = [residual(model, first, ids) for ids in samples]
    leaving = [residual(model, first + size, ids) for ids in samples]
    layer = lone.model.layers[0]
    parameters = list(layer.parameters())
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]

    def error() -> torch.Tensor:
        outputs = [lone.model(inputs_embeds=x[None], use_cache=False).last_hidden_state[0] for x in entering]
        return torch.cat([o - y for o, y in zip(outputs, leaving, strict=True)]).square().mean()

    before = error().item()
    for step in range(1, steps + 1):
        gradients = torch.autograd.grad(error(), parameters)
        with torch.no_grad():
            for p, g, (m, v) in zip(parameters, gradients, moments, strict=True):
                m.mul_(0.9).add_(g, alpha=0.1)
                v.mul_(0.999).addcmul_(g, g, value=0.001)
                now = rate * (1 - (step - 1) / steps)
                p.sub_(now * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8))
    return Fit(layer, before, error().item())


@dataclass(frozen=True)
class Threshold:
    """What Algorithm 1 does at threshold T: (layer, absorbed) of the accepted merges, and every similarity seen."""

    T: float
    merges: list[tuple[int, int]]
    depth: int
    similarities: list[float]


def all_thresholds(
    original: nn.Module,
    samples: Samples,
    *,
    C: int,
    L: int,
    H: int,
    I: int,  # noqa: E741
    rule: str,
    fewest: int = 1,
) -> list[Threshold]:
    """Every plan that any threshold gives, highest first, by full runs.

    Decisions change only where T passes a similarity that some run sees, so runs at each of those, until none is new.
    """
    waiting, results = [1.0], {}
    while waiting:
        T = waiting.pop()
        run = layer_collapse(original, samples, C=C, L=L, H=H, I=I, T=T, rule=rule, fewest=fewest)
        similarities = [c.similarity for c in run.candidates]
        merges = [(c.layer, c.absorbed) for c in run.merges]
        results[T] = Threshold(T, merges, len(run.model.model.layers), similarities)
        new = {math.nextafter(s, -math.inf) for s in similarities}
        waiting = sorted({*waiting, *new} - set(results))
    return [results[T] for T in sorted(results, reverse=True)]
