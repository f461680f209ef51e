"""What is told of a run to those who get its model: which texts, how many tokens of them, and how it learned."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from laco_train.settings import DataSettings, ModelSettings
from laco_train.training.distill import distills


def told_of_run(summary: Mapping[str, Mapping[str, Any]], data: DataSettings, model: ModelSettings) -> dict[str, Any]:
    """`summary` of the packed texts by role (`PackedText.summary`), and beside it what a card tells of them.

    That is for each role `texts`, as the recipe names them, and for train `how`: sentences on the method.
    """
    texts = {"train": data.train, "validation": data.validation}
    told = {role: {**values, "texts": _names(texts[role])} for role, values in summary.items()}
    told["train"]["how"] = _how(model)
    return told


def _names(texts: str | list[str] | None) -> list[str]:
    """As the recipe has them; of paths from the root or the home the last part, as folders of a machine tell no one."""
    listed = [texts] if isinstance(texts, str) else texts or []
    return [Path(text).name if Path(text).is_absolute() or text.startswith("~") else text for text in listed]


def _how(model: ModelSettings) -> list[str]:
    lines = []
    if model.method == "lora":
        a = model.lora
        targets = a.targets if isinstance(a.targets, str) else ", ".join(a.targets)
        lines.append(f"LoRA of rank {a.rank}, alpha {a.alpha} and dropout {a.dropout:g} on {targets}.")
    if model.method == "last_layers":
        lines.append(f"Only the last {model.last_layers} decoder layers, the final norm and the head were trained.")
    d = model.distill
    if distills(d):
        parts = [f"{1 - d.logits:g} of next-token loss"]
        if d.logits:
            parts.append(f"{d.logits:g} of divergence from the teacher's distribution at temperature {d.temperature:g}")
        if d.hidden:
            parts.append(f"{d.hidden:g} of relative error of hidden states against the teacher's")
        teacher = f"`{d.teacher or model.source}`"
        lines.append(f"Distilled from the teacher {teacher}: the loss is {' plus '.join(parts)}.")
    return lines
