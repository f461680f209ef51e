"""Lines of a model card on training."""

from collections.abc import Mapping
from typing import Any


def training_lines(data: Mapping[str, Any], refined: int) -> list[str]:
    """Lines of Markdown on `data`, see `CardFacts`, and on the tokens that refinement took before training."""
    train = data.get("train")
    how = list(train.get("how", ())) if isinstance(train, dict) else []
    if refined:
        how.insert(0, f"Before any training, the collapsed model was fitted to the original on {refined:,} tokens.")
    roles = sorted(data, key=lambda role: role != "train")
    return [f"- {line}" for line in (*(f"{role}: {_in_words(data[role])}" for role in roles), *how)]


def _in_words(value: Any) -> str:
    if not isinstance(value, dict) or "tokens" not in value:
        return str(value)
    texts = ", ".join(f"`{text}`" for text in value.get("texts", ())) or "text held out of train"
    left_out = [f"{value[name]:,} {what}" for name, what in _LEFT_OUT.items() if value.get(name)]
    return (
        f"{texts if 'texts' in value else 'text'}, {value['tokens']:,} tokens in {value['documents']:,} documents and "
        f"{value['blocks']:,} blocks{''.join(f', {one}' for one in left_out)} (sha256 {value['sha256']})"
    )


_LEFT_OUT = {
    "duplicates": "documents left out as validation holds them too",
    "skipped": "conversations left out as no answer begins in a block",
}
