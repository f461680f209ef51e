"""Comparisons of parameters, against plain loops over pairs of layers."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from laco_train.analysis import parameters
from laco_train.analysis.parameters import WHOLE_LAYER, compare_parameters, dot_products, pairs_from, parameter_names
from tests.collapse.helpers import scramble


@pytest.fixture(scope="module")
def layers(tiny_llama: Callable[..., LlamaForCausalLM]) -> list[nn.Module]:
    return list(scramble(tiny_llama(layers=4), seed=1).model.layers)


def oracle(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """Cosine and relative distance of two vectors."""
    a, b = a.double().flatten(), b.double().flatten()
    lengths = math.sqrt(sum(x * x for x in a.tolist())), math.sqrt(sum(x * x for x in b.tolist()))
    cosine = sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True)) / (lengths[0] * lengths[1])
    between = math.sqrt(sum((x - y) ** 2 for x, y in zip(a.tolist(), b.tolist(), strict=True)))
    return cosine, between / (sum(lengths) / 2)


@pytest.mark.parametrize("chunk", [1 << 23, 40])
def test_every_pair_of_every_module(layers: list[nn.Module], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parameters, "_CHUNK", chunk)
    names = parameter_names(layers)
    assert names == [name for name, _ in layers[0].named_parameters()]
    found = {pairs.name: pairs for pairs in compare_parameters(layers, names)}
    assert list(found) == [WHOLE_LAYER, *names]
    vectors = {name: [layer.get_parameter(name).detach() for layer in layers] for name in names}
    vectors[WHOLE_LAYER] = [torch.cat([p.detach().flatten() for p in layer.parameters()]) for layer in layers]
    for name, values in vectors.items():
        for i, a in enumerate(values):
            for j, b in enumerate(values):
                cosine, distance = oracle(a, b)
                assert found[name].cosine[i, j].item() == pytest.approx(cosine, abs=1e-9)
                assert found[name].distance[i, j].item() == pytest.approx(distance, abs=1e-7)


def test_nearly_equal_layers_keep_their_small_distance() -> None:
    a, b = nn.Linear(50, 50), nn.Linear(50, 50)
    with torch.no_grad():
        b.weight.copy_(a.weight * 1.001)
    found = pairs_from("weight", dot_products([a, b], "weight"))
    assert found.distance[0, 1].item() == pytest.approx(0.001 / 1.0005, rel=1e-4)


def test_layers_of_other_shapes_and_without_the_parameter_have_no_number() -> None:
    layers = [nn.Linear(3, 2), nn.Linear(3, 2, bias=False), nn.Linear(4, 2), nn.Linear(3, 2)]
    weight, bias = (pairs_from(name, dot_products(layers, name)) for name in ("weight", "bias"))
    known = torch.tensor([[1, 1, 0, 1], [1, 1, 0, 1], [0, 0, 1, 0], [1, 1, 0, 1]]).bool()
    assert torch.equal(weight.cosine.isfinite(), known)
    assert torch.equal(bias.distance.isfinite()[1], torch.zeros(4).bool())
    expected = oracle(layers[0].weight.detach(), layers[3].weight.detach())[0]
    assert weight.cosine[0, 3].item() == pytest.approx(expected, abs=1e-9)
    assert parameter_names(layers) == ["weight", "bias"]
