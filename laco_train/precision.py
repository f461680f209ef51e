"""From names in a recipe to the type of weights."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch

from laco_train.errors import InputError

_NAMED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TRUE = {"bf16-true": torch.bfloat16, "16-true": torch.float16}


def named_dtype(name: str) -> torch.dtype:
    """The type called `name`: float32, bfloat16 or float16."""
    return _NAMED[name]


def weights_dtype(name: str, precision: str) -> torch.dtype:
    """The type called `name`; for ``auto`` that of Lightning's `precision`, float32 unless it ends in ``-true``.

    Raises:
        InputError: `precision` makes all weights of another type.
    """
    cast = _TRUE.get(precision)
    if name == "auto":
        return cast or torch.float32
    if cast not in (None, _NAMED[name]):
        raise InputError("model.dtype", f"is {name}, but weights are cast by trainer.precision {precision}; say auto")
    return _NAMED[name]


def forward_context(precision: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """What Lightning wraps forward passes in under `precision`: autocast where it ends in ``-mixed``."""
    mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    return nullcontext if mixed is None else partial(torch.autocast, device.type, dtype=mixed)
