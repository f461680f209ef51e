"""The model card: what the model is, what it was made from, what it cost, how to load it."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from laco_train.collapse import CollapsePlan


@dataclass(frozen=True)
class CardFacts:
    """What a model card tells beside the plan.

    Attributes:
        base_model: what ``model.source`` named.
        recipe: name of the recipe.
        method: ``full``, ``lora`` or ``last_layers``.
        data: what it was trained on, as label: value, such as {"train": "austen.jsonl.gz", "block_size": 1024}.
        losses: validation losses in nats per token, in order, such as original, collapsed, trained.
        tokens: tokens trained on.
        steps: optimizer steps.
        licence: the base model's licence as the Hub spells it, such as ``apache-2.0``; None if unknown.
    """

    base_model: str
    recipe: str
    method: str
    data: dict[str, Any]
    losses: dict[str, float]
    tokens: int
    steps: int
    licence: str | None


def model_card(facts: CardFacts, plan: CollapsePlan | None) -> str:
    """README.md of an export: the Hub's metadata, then text for people."""
    sections = [_metadata(facts), _what(facts, plan)]
    if plan is not None:
        sections.append(_layers(plan))
    sections += [_training(facts), _use(), _proof()]
    return "\n".join(sections)


def _metadata(facts: CardFacts) -> str:
    values: dict[str, Any] = {}
    # the Hub takes ids only here: a path or a package's file is told in the text
    if re.fullmatch(r"[\w.-]+/[\w.-]+", facts.base_model) and not Path(facts.base_model).exists():
        values["base_model"] = facts.base_model
    if facts.licence is not None:
        values["license"] = facts.licence
    values |= {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["layer-collapse", "depth-pruning"],
    }
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---\n"


def _what(facts: CardFacts, plan: CollapsePlan | None) -> str:
    trained = {
        "full": "every weight was trained",
        "lora": "LoRA adapters were trained and merged",
        "last_layers": "its last layers and its head were trained",
    }[facts.method]
    after = f"then {trained}" if facts.steps else "without training since"
    licence = f"\n\nThe base model's licence ({facts.licence}) holds for this model too." if facts.licence else ""
    if plan is None:
        title = "Post-trained model"
        body = f"`{facts.base_model}` with all its decoder layers, {after}."
    else:
        title = f"A model collapsed from {plan.source_depth} to {plan.depth} decoder layers"
        body = f"`{facts.base_model}` with {plan.depth} of its {plan.source_depth} decoder layers, {after}."
    return f"# {title}\n\n{body} Made by the recipe `{facts.recipe}`.{licence}\n"


def _layers(plan: CollapsePlan) -> str:
    counts = plan.parameters
    rows = [f"| {new} | {_origin(plan, old)} |" for new, old in enumerate(plan.lineage)]
    removed = f"\nRemoved without a merge: {_listed(plan.removed)}.\n" if plan.removed else ""
    return "\n".join(
        [
            "## Layers",
            "",
            _how_chosen(plan),
            "",
            f"Parameters: {counts.before:,} before, {counts.after:,} after ({counts.ratio:.1%} removed).",
            "",
            "| layer here | layers of the base model |",
            "|---|---|",
            *rows,
            removed,
            "Layers count from 0. `collapse_plan.json` holds the whole plan.",
            "",
        ]
    )


def _how_chosen(plan: CollapsePlan) -> str:
    if plan.rounds:
        lines = [f"Collapsed {len(plan.rounds)} times, each time what the time before left:", ""]
        for number, one in enumerate(plan.rounds, 1):
            trained = "" if one.trained == 0 else ", after training on text"
            if one.trained:
                trained = f", after training on {one.trained:,} tokens"
            how = f"strategy `{one.strategy}`, merge rule `{one.merge_rule}`"
            lines.append(f"{number}. from {one.source_depth} to {one.depth} layers{trained} ({how})")
        return "\n".join(lines)
    if plan.strategy == "remove":
        return "The layers were named by hand."
    if plan.strategy == "none":
        return "No layer was removed."
    if plan.strategy != "laco":
        return f"Chosen by the strategy `{plan.strategy}`, down to {plan.depth} layers."
    letters = {
        "C": "layers_per_merge",
        "L": "lowest_layer",
        "H": "highest_layer",
        "I": "min_interval",
        "T": "similarity_threshold",
    }
    values = (
        f"{letter} = {plan.settings[key]}" for letter, key in letters.items() if plan.settings.get(key) is not None
    )
    norms = "norms merged too" if plan.merge_norms else "norms of the first layer kept"
    measured = ""
    if plan.calibration is not None:
        measured = f", on {plan.calibration.samples} calibration samples ({plan.calibration.tokens:,} tokens)"
    return (
        f"Found by Layer Collapse (arXiv 2402.11187): {', '.join(values)}, merge rule `{plan.merge_rule}` "
        f"({norms}){measured}."
    )


def _origin(plan: CollapsePlan, old: tuple[int, ...]) -> str:
    rule = "" if plan.rounds else f" (`{plan.merge_rule}`)"
    return str(old[0]) if len(old) == 1 else f"{_listed(old)} merged{rule}"


def _listed(indices: tuple[int, ...]) -> str:
    return ", ".join(map(str, indices))


def _training(facts: CardFacts) -> str:
    parts = ["## Training and loss", ""]
    if facts.steps:
        parts += [f"{facts.tokens:,} tokens in {facts.steps:,} optimizer steps (method `{facts.method}`).", ""]
    if facts.data:
        parts += [*(f"- {label}: {value}" for label, value in facts.data.items()), ""]
    if facts.losses:
        rows = [f"| {name} | {loss:.3f} | {_perplexity(loss)} |" for name, loss in facts.losses.items()]
        parts += ["| model | validation loss, nats per token | perplexity |", "|---|---|---|", *rows, ""]
        parts += ["Perplexities compare only on the same text, block length and tokenizer.", ""]
    return "\n".join(parts)


def _perplexity(loss: float) -> str:
    # exp overflows a float64 above 709
    return f"{math.exp(loss):,.4g}" if loss < 100 else "over 1e43"


def _use() -> str:
    return """## Use

Plain Transformers; nothing else is needed.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
inputs = tokenizer("The river rises in", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0], skip_special_tokens=True))
```
"""


def _proof() -> str:
    return """## Proof

This folder was written under another name, reloaded in plain Transformers in float32, and renamed only because every
weight and the logits of several prompts equalled those of the model in memory bit for bit, greedy generation with a KV
cache equalled that without, and the tokenizer encoded alike.
"""
