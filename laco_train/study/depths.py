"""Which depth a share of all parameters is."""

from collections.abc import Sequence

import torch

from laco_train.collapse.decoder import decoder_of, parameters_a_layer
from laco_train.errors import InputError
from laco_train.settings import ModelSettings
from laco_train.training.parallel import skeleton


def depths_at(ratios: Sequence[float], model: ModelSettings) -> dict[float, int]:
    """Layers that remain at each of `ratios`; no weights are read.

    Raises:
        InputError: a ratio leaves no layer, or two leave the same; or layers differ in size.
    """
    empty = skeleton(model.source, dtype=torch.float32, trust_remote_code=model.trust_remote_code)
    decoder = decoder_of(empty)
    layer = parameters_a_layer(decoder, "study.ratios")
    parameters = sum(p.numel() for p in empty.parameters())
    depths: dict[float, int] = {}
    for ratio in ratios:
        left = depth_at(ratio, parameters, layer, decoder.depth)
        for other, depth in depths.items():
            if depth == left:
                raise InputError("study.ratios", f"{other:g} and {ratio:g} both leave {left} layers; drop one")
        depths[ratio] = left
    return depths


def depth_at(ratio: float, parameters: int, layer: float, depth: int) -> int:
    """The depth nearest to a model without `ratio` of its `parameters`: one layer less at least.

    Args:
        ratio: above 0, below 1.
        parameters: all of the model, its embeddings too.
        layer: parameters of one layer.
        depth: layers of the model.
    """
    removed = max(1, round(ratio * parameters / layer))
    if removed >= depth:
        most = (depth - 1) * layer / parameters
        raise InputError("study.ratios", f"{ratio:g} leaves no layer; all but one are {most:.2f} of the parameters")
    return depth - removed
