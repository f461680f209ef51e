"""The settings that are looked up again in a plan; the others that it holds are a record."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from laco_train.collapse.reading import build


@dataclass(frozen=True)
class _LookedUp:
    similarity_threshold: float | None
    target_depth: int | None = None
    target_ratio: float | None = None
    refine: dict[str, Any] | None = None


def check_settings(settings: dict[str, Any]) -> None:
    """ValueError, naming the key, unless what is looked up in a plan's `settings` is there and of its type."""
    names = {field.name for field in dataclasses.fields(_LookedUp)} & set(settings)
    known = build(_LookedUp, {name: settings[name] for name in names}, "plan.settings")
    if known.target_ratio is not None and not 0 < known.target_ratio < 1:
        raise ValueError(f"plan.settings.target_ratio is {known.target_ratio}, which is no share")
    tokens = (known.refine or {}).get("tokens", 0)
    if type(tokens) is not int:
        raise ValueError(f"plan.settings.refine.tokens is {tokens!r}, which is no int")
