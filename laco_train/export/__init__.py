"""From a trained model to a folder that plain Transformers loads, proven before it appears under its name."""

from laco_train.export.card import CardFacts, model_card
from laco_train.export.cpu_copy import cpu_copy
from laco_train.export.huggingface import export_folder, save_adapter
from laco_train.export.proof import Proof, prove
from laco_train.export.whole import refuse_nonempty

__all__ = [
    "CardFacts",
    "Proof",
    "cpu_copy",
    "export_folder",
    "model_card",
    "prove",
    "refuse_nonempty",
    "save_adapter",
]
