"""A model to be timed: as it was saved, unless told otherwise."""

import torch
from transformers import PreTrainedModel

from laco_train.models import load_config, load_model
from laco_train.precision import named_dtype
from laco_train.settings import Dtype


def load_as_saved(source: str, dtype: Dtype = "auto") -> PreTrainedModel:
    """The model at `source` on the CPU, in eval mode, in `dtype`; auto: the type that its config names.

    Raises:
        InputError: as `load_model`.
    """
    own = load_config(source).dtype if dtype == "auto" else named_dtype(dtype)
    return load_model(source, dtype=own if isinstance(own, torch.dtype) else torch.float32)
