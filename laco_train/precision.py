"""From names in a recipe to the type of weights."""

import torch

_NAMED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TRUE = {"bf16-true": torch.bfloat16, "16-true": torch.float16}


def named_dtype(name: str) -> torch.dtype:
    """The type called `name`: float32, bfloat16 or float16."""
    return _NAMED[name]


def weights_dtype(name: str, precision: str) -> torch.dtype:
    """The type called `name`; for ``auto`` that of Lightning's `precision`, float32 unless it ends in ``-true``."""
    return _TRUE.get(precision, torch.float32) if name == "auto" else _NAMED[name]
