"""Exports for other runtimes: a proven Transformers model, converted, loaded by its own runtime and compared."""

import importlib.util
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from laco_train.collapse import CollapsePlan
from laco_train.errors import InputError, TrainingStopped
from laco_train.export.card import TRANSFORMERS, CardFacts, Packaging, with_findings
from laco_train.export.cpu_copy import cpu_copy
from laco_train.export.huggingface import with_licence, write_card, write_folder
from laco_train.export.proof import PLAN_FILE
from laco_train.export.whole import appearing_whole, refuse_nonempty


class Format(Protocol):
    """How a format is written and proven."""

    @property
    def packaging(self) -> Packaging:
        """For the model card; its proof is filled in."""

    @property
    def rounded_to(self) -> torch.dtype:
        """Type that the weights go through before anything is compared."""

    def write(self, source: Path, model: PreTrainedModel, folder: Path) -> None:
        """Write `model`, which is in the Transformers folder `source` too, into `folder`."""

    def prove(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[str]:
        """Load `folder` in the format's own runtime, compare it with `model`, and say how near it was."""


def require(name: str, packages: Sequence[str]) -> None:
    """InputError unless what the format `name` needs is installed."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        extra = f"pip install 'laco-train[{name}]'"
        raise InputError("--format", f"{name} needs {', '.join(missing)}; run `{extra}` or `pip install` these")


def export_converted(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    name: str,
    form: Format,
    *,
    plan: CollapsePlan | None,
    card: CardFacts,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Export `model` in another format to `output`, which exists only once the proof holds.

    Needs CPU memory for two float32 copies of the model, and for a while disk space for one beside `output`.

    Args:
        model: a causal LM on any device; LoRA is merged.
        tokenizer: goes into the folder too.
        output: folder that does not exist, or is empty.
        name: of the format, for the manifest.
        form: how it is written and proven.
        plan: written as collapse_plan.json; None for a model that was not collapsed.
        card: what the model card tells.
        say: called with a line at each step.

    Returns:
        The lines of the proof.

    Raises:
        InputError: `output` can't be written, see `refuse_nonempty`.
        TrainingStopped: the model can't be converted, or the proof failed; nothing is left behind.
    """
    refuse_nonempty(output, "--output")
    card = with_licence(card)
    say("export: copying the model to the CPU")
    duplicate = cpu_copy(model, form.rounded_to).float()
    with appearing_whole(output, {"format": name, "card": card.to_dict()}) as folder:
        say(f"export: writing {folder}")
        source = folder / ".transformers"
        source.mkdir()
        write_folder(duplicate, tokenizer, source, plan=plan)
        write_card(source, card, plan, TRANSFORMERS)  # llama.cpp's converter reads the metadata, such as the licence
        form.write(source, duplicate, folder)
        shutil.rmtree(source)
        say(f"export: loading it in its own runtime ({name}), and comparing with Transformers in float32")
        lines = form.prove(duplicate, tokenizer, folder)
        try:
            tokenizer.save_pretrained(folder)
            if plan is not None:
                plan.save(folder / PLAN_FILE, weights=False)
        except OSError as error:
            raise TrainingStopped(f"export: can't write {folder}: {error}") from error
        write_card(folder, card, plan, with_findings(form.packaging, lines))
    for line in lines:
        say(f"export: {line}")
    say(f"export: {output} is complete")
    return lines
