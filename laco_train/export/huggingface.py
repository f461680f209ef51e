"""Writes a Hugging Face folder beside its final name, proves it, then renames it (issue 2, Export)."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from laco_train.collapse import CollapsePlan
from laco_train.errors import InputError, TrainingStopped
from laco_train.export.card import CardFacts, model_card
from laco_train.export.cpu_copy import cpu_copy
from laco_train.export.proof import PLAN_FILE, Proof, prove


def export_folder(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    *,
    dtype: torch.dtype,
    plan: CollapsePlan | None,
    card: CardFacts,
    say: Callable[[str], None] = print,
) -> Proof:
    """Export `model` to `output`, which exists only once the proof holds; `model` itself is not touched.

    Needs CPU memory for about two float32 copies of the model, and no GPU memory.

    Args:
        model: a causal LM on any device, in any mode; LoRA is merged.
        tokenizer: goes into the folder with its chat template.
        output: folder that does not exist, or is empty.
        dtype: type of the written weights.
        plan: written as collapse_plan.json; None for a model that was not collapsed.
        card: what the model card tells.
        say: called with a line at each step.

    Raises:
        InputError: `output` can't be written, see `refuse_nonempty`.
        TrainingStopped: writing or the proof failed; nothing is left behind.
    """
    refuse_nonempty(output, "--output")
    name = str(dtype).removeprefix("torch.")
    say(f"export: copying the model to the CPU as {name}")
    duplicate = cpu_copy(model, dtype)
    with _appearing_whole(output) as folder:
        say(f"export: writing {folder}")
        write_folder(duplicate, tokenizer, folder, plan=plan, card=card)
        say("export: reloading it in plain Transformers, in float32, and comparing")
        proof = prove(folder, duplicate, tokenizer, plan)
    for line in proof.lines():
        say(f"export: {line}")
    say(f"export: {output} is complete")
    return proof


def refuse_nonempty(output: Path, key: str) -> None:
    """InputError, naming `key`, unless a folder can be made at `output` without touching what is there."""
    target = output.expanduser().resolve()
    if target.is_mount():
        raise InputError(key, f"{output} is a mount point, which can't be renamed to; name a folder inside it")
    if target.is_dir() and any(target.iterdir()):
        raise InputError(key, f"{output} exists and is not empty; name another folder or empty it")
    if target.exists() and not target.is_dir():
        raise InputError(key, f"{output} is a file; name a folder")
    parent = next(parent for parent in target.parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(key, f"no folder can be made in {parent}; name one that you may write to")


def write_folder(
    duplicate: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    plan: CollapsePlan | None,
    card: CardFacts,
) -> None:
    """Write weights, config, generation config, tokenizer, plan and model card of a `cpu_copy` into `folder`.

    Raises:
        TrainingStopped: the disk is full, or Transformers can't save this model.
    """
    _mend_generation_config(duplicate)
    try:
        duplicate.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if plan is not None:
            plan.save(folder / PLAN_FILE, weights=False)  # the folder's own weights hold what was fitted
        (folder / "README.md").write_text(model_card(card, plan), encoding="utf-8")
    except (OSError, SafetensorError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise TrainingStopped(f"export: can't write {folder}: {reason}") from error


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapters of `model`, not its base, to `folder` in peft's own format.

    They fit the collapsed base only: ``PeftModel.from_pretrained(collapsed, folder)``.

    Raises:
        InputError: `folder` can't be written, see `refuse_nonempty`.
    """
    refuse_nonempty(folder, "--output")
    with _appearing_whole(folder) as aside:
        # the vocabulary never changes here, and finding that out by itself would make peft ask the hub
        model.save_pretrained(str(aside), save_embedding_layers=False)


@contextmanager
def _appearing_whole(output: Path) -> Iterator[Path]:
    """A folder beside `output` to write to, renamed to it if the block succeeds, removed if it does not."""
    target = output.expanduser().resolve()
    aside = target.with_name(f"{target.name}.partial-{os.getpid()}")
    if aside.exists():  # left by a dead run that had the same process id
        shutil.rmtree(aside)
    aside.mkdir(parents=True)
    try:
        yield aside
        aside.replace(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _mend_generation_config(model: PreTrainedModel) -> None:
    """Older models give a temperature without ``do_sample``: Transformers loads that but refuses to save it."""
    config = model.generation_config
    if config is None:
        return
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True
