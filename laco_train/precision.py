"""From names in a recipe to the type of weights."""

from collections.abc import Callable, Iterable
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


def weights_dtype(name: str, precision: str, trains: str | None = None) -> torch.dtype:
    """The type called `name`; for ``auto`` that of Lightning's `precision`, float32 unless it ends in ``-true``.

    Args:
        trains: model.method by which the weights are to train; None: they are not.

    Raises:
        InputError: `precision` makes all weights of another type, or what trains would be float16.
    """
    cast = _TRUE.get(precision)
    if cast is not None and name != "auto" and cast != _NAMED[name]:
        raise InputError("model.dtype", f"is {name}, but weights are cast by trainer.precision {precision}; say auto")
    dtype = cast or (torch.float32 if name == "auto" else _NAMED[name])
    if trains is not None:
        # peft makes adapters float32 on half precision, and only a -true precision casts them
        refuse_float16([dtype if trains != "lora" else cast or torch.float32])
    return dtype


def refuse_float16(trained: Iterable[torch.dtype]) -> None:
    """Refuse to train weights of float16: squares of small gradients, by which AdamW divides, are 0 in it.

    Args:
        trained: types of the weights that train.

    Raises:
        InputError: float16 is among them.
    """
    if torch.float16 in trained:
        raise InputError(
            "trainer.precision",
            "would train weights in float16, which loses the small numbers that AdamW divides by; "
            "use bf16-true, bf16-mixed or 32-true, and model.dtype auto",
        )


def forward_context(precision: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """What Lightning wraps forward passes in under `precision`: autocast where it ends in ``-mixed``."""
    mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    return nullcontext if mixed is None else partial(torch.autocast, device.type, dtype=mixed)
