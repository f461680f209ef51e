"""Layer Collapse as pure functions on Transformers models; imports neither Lightning nor the command line."""

from laco_train.collapse.apply import (
    apply_plan,
    collapse_model,
    count_parameters,
    fingerprint,
    make_plan,
    placement_for,
)
from laco_train.collapse.decoder import Decoder, decoder_of
from laco_train.collapse.plan import CollapsePlan

__all__ = [
    "CollapsePlan",
    "Decoder",
    "apply_plan",
    "collapse_model",
    "count_parameters",
    "decoder_of",
    "fingerprint",
    "make_plan",
    "placement_for",
]
