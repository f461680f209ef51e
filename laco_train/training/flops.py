"""Floating-point operations of training, by the count that model FLOPs utilisation (MFU) is defined by; pure.

A product with a weight matrix costs 2 operations a weight and token. The forward pass does it once; the backward pass
once for the gradient of its input, and once for that of the weight if it trains: 6 N a token for N weights that all
train. In attention a token looks at k tokens: q k' and the weighted sum of values cost 2 d k each, 4 d k forward and
8 d k backward, 12 L d k over L layers. In a document of n tokens k is n without a mask; the causal mask halves that on
average: 6 L d n. Averaged over tokens, sum(n * n) / sum(n) = T stands for n, so a token costs 6 N + 6 L d T.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Trained:
    """What of a model trains.

    Attributes:
        layers, width: decoder layers, and what their attention is wide: its query heads times the size of one.
        parameters: N: all parameters, embeddings and head included, tied ones once; of experts those a token takes.
        trainable: those that train.
        frozen_layers: decoder layers below the lowest one that trains, which no gradient reaches.
        frozen_below: parameters of those layers, and of the embeddings.
    """

    layers: int
    width: int
    parameters: int
    trainable: int
    frozen_layers: int = 0
    frozen_below: int = 0


def mean_attended(position_ids: NDArray[Any]) -> float:
    """T: mean length of the document that a token of the blocks is in, sum(n * n) / sum(n).

    Padding at the end of a block counts as a document: it is computed all the same.

    Args:
        position_ids: (blocks, block_size); documents and blocks begin at 0.
    """
    flat = position_ids.reshape(-1)
    lengths = np.diff(np.append(np.flatnonzero(flat == 0), flat.size)).astype(np.float64)
    return float((lengths**2).sum() / lengths.sum())


def flops_per_token(model: Trained, attended: float) -> float:
    """Operations of training a token: 6 N + 6 L d T if all of `model` trains.

    Less where less trains: LoRA saves the weight gradients of all but the adapters (4 N + 2 * trainable), and layers
    below the lowest that trains have a forward pass alone. What a layer recomputes (checkpointing) and what a teacher
    computes don't count.

    Args:
        model: what trains of it.
        attended: T, see `mean_attended`.
    """
    reached = model.parameters - model.frozen_below
    attention = 2 * model.layers + 4 * (model.layers - model.frozen_layers)
    return 2 * model.parameters + 2 * reached + 2 * model.trainable + attention * model.width * attended
