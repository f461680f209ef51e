"""One step of AdamW (Loshchilov and Hutter, arXiv 1711.05101) in float64, written from the formulas."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Hyper:
    """Settings of a step."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


def adamw_step(
    weight: Values, gradient: Values, mean: Values, square: Values, step: int, hyper: Hyper
) -> tuple[Values, Values, Values]:
    """(weight, first moment, second moment) after step number `step`, counted from 1."""
    mean = hyper.beta1 * mean + (1 - hyper.beta1) * gradient
    square = hyper.beta2 * square + (1 - hyper.beta2) * gradient**2
    unbiased_mean = mean / (1 - hyper.beta1**step)
    unbiased_square = square / (1 - hyper.beta2**step)
    move = unbiased_mean / (np.sqrt(unbiased_square) + hyper.eps)
    return weight - hyper.lr * (move + hyper.weight_decay * weight), mean, square
