"""Writes a Hugging Face folder beside its final name, proves it, then renames it (issue 2, Export)."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from laco_train.collapse import CollapsePlan
from laco_train.errors import TrainingStopped
from laco_train.export.card import ADAPTER, TRANSFORMERS, CardFacts, Packaging, model_card, with_findings
from laco_train.export.cpu_copy import adapted_copy, cpu_copy
from laco_train.export.licence import licence_of
from laco_train.export.proof import PLAN_FILE, Proof, adapted_texts, prove, prove_adapter
from laco_train.export.whole import appearing_whole, refuse_nonempty
from laco_train.settings import ExportSettings

ADAPTER_FOLDER = "adapter"
"""In an export that keeps its adapter: peft's folder."""


def export_folder(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    *,
    dtype: torch.dtype,
    plan: CollapsePlan | None,
    card: CardFacts,
    shard_size: str = ExportSettings.shard_size,
    keep_adapter: bool = False,
    say: Callable[[str], None] = print,
) -> Proof:
    """Export `model` to `output`, which exists only once the proof holds; `model` itself is not touched.

    Needs CPU memory for about two float32 copies of the model, and no GPU memory.

    Args:
        model: a causal LM on any device, in any mode.
        tokenizer: goes into the folder with its chat template.
        output: folder that does not exist, or is empty.
        dtype: type of the written weights.
        plan: written as collapse_plan.json; None for a model that was not collapsed.
        card: what the model card tells; a licence that it lacks is looked for with the base model.
        shard_size: of a weights file at most, as Transformers has it.
        keep_adapter: write LoRA as peft's folder ``adapter`` in `output`, with its base unchanged; else it is merged.
        say: called with a line at each step.

    Raises:
        InputError: `output` can't be written, see `refuse_nonempty`.
        TrainingStopped: writing or the proof failed; nothing is left behind.
    """
    refuse_nonempty(output, "--output")
    name = str(dtype).removeprefix("torch.")
    card = with_licence(card)
    say(f"export: copying the model to the CPU as {name}")
    expected = None
    if keep_adapter:
        assert isinstance(model, PeftModel)
        adapted = adapted_copy(model, dtype)
        expected = adapted_texts(adapted, tokenizer)
        duplicate = cpu_copy(adapted.unload(), dtype)
        del adapted
    else:
        duplicate = cpu_copy(model, dtype)
    about = {"format": "hf", "card": card.to_dict()}
    with appearing_whole(output, about) as folder:
        say(f"export: writing {folder}")
        write_folder(duplicate, tokenizer, folder, plan=plan, shard_size=shard_size)
        if keep_adapter:
            _save_peft(model, folder / ADAPTER_FOLDER, base="..")  # type: ignore[arg-type]
        say("export: reloading it in plain Transformers, in float32, and comparing")
        proof = prove(folder, duplicate, tokenizer, plan)
        lines, packaging = proof.lines(), TRANSFORMERS
        if expected is not None:
            trusted = duplicate.is_remote_code()
            del duplicate
            say("export: reloading the adapter onto it by peft, and comparing")
            found = prove_adapter(folder, folder / ADAPTER_FOLDER, expected, trust_remote_code=trusted).lines()
            lines, packaging = lines + found, with_findings(ADAPTER, found)
        write_card(folder, card, plan, packaging)
    for line in lines:
        say(f"export: {line}")
    say(f"export: {output} is complete")
    return proof


def with_licence(card: CardFacts) -> CardFacts:
    """`card` with the base model's licence, as far as that tells one."""
    return card if card.licence is not None else replace(card, licence=licence_of(card.base_model))


def write_folder(
    duplicate: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    plan: CollapsePlan | None,
    shard_size: str = ExportSettings.shard_size,
) -> None:
    """Write weights, config, generation config, tokenizer and plan of a `cpu_copy` into `folder`.

    Raises:
        TrainingStopped: the disk is full, or Transformers can't save this model.
    """
    _mend_generation_config(duplicate)
    try:
        duplicate.save_pretrained(folder, max_shard_size=shard_size)
        tokenizer.save_pretrained(folder)
        if plan is not None:
            plan.save(folder / PLAN_FILE, weights=False)  # the folder's own weights hold what was fitted
    except (OSError, SafetensorError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise TrainingStopped(f"export: can't write {folder}: {reason}") from error


def write_card(folder: Path, card: CardFacts, plan: CollapsePlan | None, packaging: Packaging) -> None:
    """Write the model card of what was proven in `folder`.

    Raises:
        TrainingStopped: the disk is full.
    """
    try:
        (folder / "README.md").write_text(model_card(card, plan, packaging), encoding="utf-8")
    except OSError as error:
        raise TrainingStopped(f"export: can't write {folder}: {error}") from error


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapters of `model`, not its base, to `folder` in peft's own format.

    They fit the collapsed base only: ``PeftModel.from_pretrained(collapsed, folder)``.

    Raises:
        InputError: `folder` can't be written, see `refuse_nonempty`.
    """
    refuse_nonempty(folder, "--output")
    with appearing_whole(folder, {"format": "adapter"}) as aside:
        _save_peft(model, aside)


def _save_peft(model: PeftModel, folder: Path, base: str | None = None) -> None:
    # the vocabulary never changes here, and finding that out by itself would make peft ask the hub
    try:
        model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # a form to fill in, with paths of this machine
        if base is not None:
            path = folder / "adapter_config.json"
            values = json.loads(path.read_text(encoding="utf-8"))
            path.write_text(json.dumps(values | {"base_model_name_or_path": base}, indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise TrainingStopped(f"export: can't write {folder}: {' '.join(str(error).split())}") from error


def _mend_generation_config(model: PreTrainedModel) -> None:
    """Older models give a temperature without ``do_sample``: Transformers loads that but refuses to save it."""
    config = model.generation_config
    if config is None:
        return
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True
