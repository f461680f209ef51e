"""What an export is made from: a training checkpoint, or a model folder that is exported already."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from laco_train.collapse import CollapsePlan
from laco_train.collapse.composition import from_the_first_model
from laco_train.errors import InputError
from laco_train.export.card import CardFacts
from laco_train.export.measured import of_run
from laco_train.export.proof import PLAN_FILE
from laco_train.manifest import MANIFEST, read_manifest
from laco_train.models import load_config, load_model, load_tokenizer
from laco_train.options import keys_of_options
from laco_train.training.checkpoint import read_checkpoint, restore

KEY = "--checkpoint"


@dataclass(frozen=True)
class Source:
    """A model to export.

    Attributes:
        model: a causal LM on the CPU, with its adapters if it has any.
        tokenizer: its tokenizer.
        dtype: type of its weights.
        plan: its collapse; None if it was not collapsed.
        card: what its model card tells.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    plan: CollapsePlan | None
    card: CardFacts


def read_source(path: Path, *, trust_remote_code: bool = False) -> Source:
    """The model in a checkpoint of fit, in one file or in shards, or in a Transformers folder.

    A checkpoint names its model, so that its own word does not suffice to run code that comes with that.

    Args:
        path: of either.
        trust_remote_code: run code that comes with the model.

    Raises:
        InputError: it is neither, or can't be read.
    """
    is_model = (path / "config.json").is_file()
    return _read_model_folder(path, trust_remote_code) if is_model else _read_checkpoint(path, trust_remote_code)


def _read_checkpoint(path: Path, trust_remote_code: bool) -> Source:
    checkpoint = read_checkpoint(path, KEY)
    if checkpoint.model.trust_remote_code and not trust_remote_code:
        problem = f"is needed: {path} was trained with code that comes with {checkpoint.model.source}"
        raise InputError("--trust-remote-code", f"{problem}; add it if you trust that code")
    model, tokenizer = restore(checkpoint)
    plan = from_the_first_model(checkpoint.plan, checkpoint.model.source)
    card = CardFacts(
        base_model=plan.source if plan.rounds else checkpoint.model.source,
        recipe=checkpoint.recipe,
        method=checkpoint.model.method,
        data=checkpoint.data,
        losses=checkpoint.losses,
        tokens=checkpoint.tokens,
        steps=checkpoint.steps,
        licence=None,
        from_scratch=checkpoint.model.from_scratch,
        evaluations=of_run(checkpoint.accuracies, checkpoint.steps),
    )
    return Source(model, tokenizer, checkpoint.dtype, plan, card)


def _read_model_folder(folder: Path, trust_remote_code: bool) -> Source:
    source = str(folder)
    with keys_of_options():
        stored = load_config(source, trust_remote_code=trust_remote_code).dtype
    dtype = stored if isinstance(stored, torch.dtype) else torch.float32
    model = load_model(source, dtype=dtype, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    plan = CollapsePlan.load(folder / PLAN_FILE) if (folder / PLAN_FILE).is_file() else None
    return Source(model, tokenizer, model.dtype, plan, _card_of(folder, plan))


def _card_of(folder: Path, plan: CollapsePlan | None) -> CardFacts:
    """As the export's manifest has it; of another model what can be known."""
    if (folder / MANIFEST).is_file():
        try:
            return CardFacts.from_dict(read_manifest(folder, KEY).export["card"])
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(KEY, f"{folder / MANIFEST} is damaged ({error}); export it again") from None
    base = str(folder) if plan is None else plan.source
    return CardFacts(base, recipe="", method="full", data={}, losses={}, tokens=0, steps=0, licence=None)
