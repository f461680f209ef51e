"""The model card: what the model is, what it was made from, what it cost, how to load it."""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from laco_train.collapse import CollapsePlan
from laco_train.export.licence import Licence
from laco_train.export.measured import Evaluated, evaluation_section, model_index
from laco_train.export.trained import training_lines


@dataclass(frozen=True)
class CardFacts:
    """What a model card tells beside the plan.

    Attributes:
        base_model: what ``model.source`` named.
        recipe: name of the recipe.
        method: ``full``, ``lora`` or ``last_layers``.
        data: what it was trained on, by role, as `told_of_run` gives it; any other label: value is told as it is. Of
            several rounds train has `refined_tokens` too, those of all.
        losses: validation losses in nats per token, in order, such as original, collapsed, trained.
        tokens: tokens trained on.
        steps: optimizer steps.
        licence: the base model's; None if unknown.
        from_scratch: whether its weights were drawn at random after the collapse.
        evaluations: what was measured of it, and of models beside it.
    """

    base_model: str
    recipe: str
    method: str
    data: dict[str, Any]
    losses: dict[str, float]
    tokens: int
    steps: int
    licence: Licence | None
    from_scratch: bool = False
    evaluations: tuple[Evaluated, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON, for `from_dict`."""
        return {**asdict(self), "evaluations": [asdict(one) for one in self.evaluations]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CardFacts":
        """What `to_dict` gave.

        Raises:
            TypeError, AttributeError: it is not that.
        """
        licence = values.get("licence")
        evaluations = tuple(Evaluated(**one) for one in values.get("evaluations") or ())
        read = {"licence": None if licence is None else Licence(**licence), "evaluations": evaluations}
        return cls(**{**values, **read})


@dataclass(frozen=True)
class Packaging:
    """What a model card tells of the files beside it.

    Attributes:
        library: that loads them, as the Hub calls it.
        tags: more of the Hub's tags.
        use: section on how to load them.
        proof: section on how they were proven.
    """

    library: str
    tags: tuple[str, ...]
    use: str
    proof: str


def with_findings(packaging: Packaging, lines: Sequence[str]) -> Packaging:
    """`packaging` with the `lines` of a proof at the end of its section on that."""
    found = "".join(f"- {line}\n" for line in lines)
    return replace(packaging, proof="\n".join(part for part in (packaging.proof, found) if part))


def model_card(facts: CardFacts, plan: CollapsePlan | None, packaging: Packaging | None = None) -> str:
    """README.md of an export: the Hub's metadata, then text for people; `packaging` None: as Transformers saves it."""
    packaging = packaging or TRANSFORMERS
    sections = [_metadata(facts, packaging), _what(facts, plan, kept_apart="lora" in packaging.tags)]
    if plan is not None:
        sections.append(_layers(plan))
    sections += [_training(facts, plan), evaluation_section(facts.evaluations)]
    sections += [f"## Use\n\n{packaging.use}", f"## Proof\n\n{packaging.proof}"]
    return "\n".join(section for section in sections if section)


def _metadata(facts: CardFacts, packaging: Packaging) -> str:
    values: dict[str, Any] = {}
    # the Hub takes ids only here: a path or a package's file is told in the text
    if re.fullmatch(r"[\w.-]+/[\w.-]+", facts.base_model) and not Path(facts.base_model).exists():
        values["base_model"] = facts.base_model
    if facts.licence is not None:
        values |= facts.licence.metadata
    values |= {
        "library_name": packaging.library,
        "pipeline_tag": "text-generation",
        "tags": ["layer-collapse", "depth-pruning", *packaging.tags],
    }
    values |= model_index(facts.recipe or facts.base_model, facts.evaluations)
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---\n"


def _what(facts: CardFacts, plan: CollapsePlan | None, *, kept_apart: bool) -> str:
    trained = {
        "full": "every weight was trained",
        "lora": f"LoRA adapters were trained and {'kept apart' if kept_apart else 'merged'}",
        "last_layers": "its last layers and its head were trained",
    }[facts.method]
    after = f"then {trained}" if facts.steps else "without training since"
    if plan is None:
        title, depth = "Post-trained model", "all its decoder layers"
    else:
        title = f"A model collapsed from {plan.source_depth} to {plan.depth} decoder layers"
        depth = f"{plan.depth} of its {plan.source_depth} decoder layers"
    if facts.from_scratch:
        title = "A model from random weights" if plan is None else f"A model of {plan.depth} layers from random weights"
        after = f"all weights drawn at random, {after}: it has that model's shape and tokenizer, none of its knowledge"
    recipe = f" Made by the recipe `{facts.recipe}`." if facts.recipe else ""
    return f"# {title}\n\n`{facts.base_model}` with {depth}, {after}.{recipe}{_licence(facts.licence)}\n"


def _licence(licence: Licence | None) -> str:
    if licence is None:
        return "\n\nThe base model's licence holds for this model too; its files did not tell which."
    reminder = f" {licence.reminder}" if licence.reminder else ""
    return f"\n\nThe base model's licence ({licence.name or licence.id}) holds for this model too.{reminder}"


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


def _training(facts: CardFacts, plan: CollapsePlan | None) -> str:
    parts = ["## Training and loss", ""]
    if facts.steps:
        parts += [f"{facts.tokens:,} tokens in {facts.steps:,} optimizer steps (method `{facts.method}`).", ""]
    refined = 0 if plan is None else plan.refinement.tokens
    train = facts.data.get("train")
    lines = training_lines(facts.data, train.get("refined_tokens", refined) if isinstance(train, dict) else refined)
    if lines:
        parts += [*lines, ""]
    if facts.losses:
        rows = [f"| {name} | {loss:.3f} | {_perplexity(loss)} |" for name, loss in facts.losses.items()]
        parts += ["| model | validation loss, nats per token | perplexity |", "|---|---|---|", *rows, ""]
        parts += ["Perplexities compare only on the same text, block length and tokenizer.", ""]
    return "\n".join(parts)


def _perplexity(loss: float) -> str:
    # exp overflows a float64 above 709
    return f"{math.exp(loss):,.4g}" if loss < 100 else "over 1e43"


_USE = """Plain Transformers; nothing else is needed.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
inputs = tokenizer("The river rises in", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0], skip_special_tokens=True))
```
"""
_PROOF = """This folder was written under another name, reloaded in plain Transformers in float32, and renamed only
because every weight, and the logits of five prompts and of the greedy tokens after them, equalled those of the model in
memory bit for bit, greedy generation with a KV cache equalled that without, and the tokenizer encoded alike.
`laco_train_manifest.json` holds the sha256 of each file.
"""
TRANSFORMERS = Packaging("transformers", (), _USE, _PROOF)
ADAPTER = Packaging(
    "transformers",
    ("lora",),
    """The trained LoRA adapter is not merged: `adapter/` holds it, the rest of this folder is the model that it adapts.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder)
base = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
model = PeftModel.from_pretrained(base, f"{folder}/adapter")
```
""",
    _PROOF + "\nThe adapter was reloaded onto it by peft, and both together compared with the model in memory.\n",
)
"""Needs `with_findings` of the adapter."""
