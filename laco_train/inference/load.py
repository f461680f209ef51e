"""A model to be timed: as it was saved, unless told otherwise."""

import torch
from transformers import PreTrainedModel

from laco_train.models import load_config, load_model
from laco_train.precision import named_dtype
from laco_train.settings import Dtype


def load_as_saved(source: str, dtype: Dtype = "auto", *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model at `source` on the CPU, in eval mode, in `dtype`; auto: the type that its config names.

    Code that comes with it is run only where that is trusted.

    Raises:
        InputError: as `load_model`.
    """
    own = load_config(source, trust_remote_code=trust_remote_code).dtype if dtype == "auto" else named_dtype(dtype)
    found = own if isinstance(own, torch.dtype) else torch.float32
    return load_model(source, dtype=found, trust_remote_code=trust_remote_code)
