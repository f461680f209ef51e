"""How alike the parameters of layers are, module by module, for all pairs of layers.

Shapes: L layers, K elements of a parameter that are compared at a time.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Numbers held in float64 at a time: 64 MiB, whatever the size of a layer.
_CHUNK = 1 << 23

WHOLE_LAYER = "whole layer"


@dataclass(frozen=True)
class ModulePairs:
    """One parameter compared between all pairs of layers.

    Attributes:
        name: its name within a layer, or WHOLE_LAYER.
        cosine: (L, L), of the flattened parameters, -1 to 1; NaN for layers that lack it or hold it in another shape.
        distance: (L, L), ||a - b|| over the mean of ||a|| and ||b||, 0 to 2; the square root of 2 for vectors of equal
            length at right angles; NaN as above.
    """

    name: str
    cosine: Tensor
    distance: Tensor


def parameter_names(layers: Iterable[nn.Module]) -> list[str]:
    """Names of the parameters that any of `layers` has, in their order of appearance."""
    return list(dict.fromkeys(name for layer in layers for name, _ in layer.named_parameters()))


@torch.no_grad()
def dot_products(layers: Sequence[nn.Module], name: str) -> Tensor:
    """(L, L) float64 inner products of parameter `name` of all pairs of layers, on the CPU.

    Each parameter is read once. Both cosine and distance follow from these: in float64 the difference of two nearly
    equal squares is exact to 1e-8 of a relative distance.

    Returns:
        NaN where a layer lacks the parameter or two hold it in different shapes.
    """
    products = torch.full((len(layers), len(layers)), torch.nan, dtype=torch.float64)
    shapes: dict[torch.Size, dict[int, Tensor]] = {}
    for index, layer in enumerate(layers):
        parameter = dict(layer.named_parameters()).get(name)
        if parameter is not None:
            shapes.setdefault(parameter.shape, {})[index] = parameter.detach().reshape(-1)
    for holders in shapes.values():
        flat = list(holders.values())
        total = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=flat[0].device)
        step = max(1, _CHUNK // len(flat))
        for start in range(0, flat[0].numel(), step):
            piece_LK = torch.stack([values[start : start + step].double() for values in flat])
            total += piece_LK @ piece_LK.T
        members = torch.tensor(list(holders))
        products[members[:, None], members[None]] = total.cpu()
    return products


def pairs_from(name: str, products: Tensor) -> ModulePairs:
    """Cosine and relative distance from the (L, L) inner products of a parameter."""
    squares = products.diagonal()
    norms = squares.sqrt()
    cosine = products / (norms[:, None] * norms[None])
    between = (squares[:, None] + squares[None] - 2 * products).clamp(min=0).sqrt()
    distance = between / ((norms[:, None] + norms[None]) / 2)
    return ModulePairs(name, cosine.clamp(-1, 1), distance)


def compare_parameters(layers: Sequence[nn.Module], names: Iterable[str]) -> list[ModulePairs]:
    """The parameters `names` of `layers`, and all of them joined to one vector, which comes first."""
    products = {name: dot_products(layers, name) for name in names}
    whole = torch.stack(list(products.values())).sum(dim=0)
    return [pairs_from(WHOLE_LAYER, whole), *(pairs_from(name, found) for name, found in products.items())]
