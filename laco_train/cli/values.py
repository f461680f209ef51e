"""What no key of a recipe can mean, whichever it is: refused before anything is made of it."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from types import NoneType
from typing import Any, get_args, get_type_hints

from laco_train.errors import InputError
from laco_train.settings import SECTIONS

_VERBS = ("fit.", "validate.")


def check_values(config: Any) -> None:
    """Refuse null where a value is needed, numbers beyond 64 bits or not finite, texts that no file can be named by.

    Args:
        config: what a parser gave, by dotted keys.

    Raises:
        InputError: names the key.
    """
    for dotted, leaf in config.items():
        key = dotted
        for verb in _VERBS:
            key = key.removeprefix(verb)
        section = key.partition(".")[0]
        kind = _kind(key)
        if is_dataclass(kind):
            raise InputError(key, f"is a section, but is {leaf!r}; write its keys, or leave it out")
        if leaf is None and kind is not None and NoneType not in get_args(kind):  # jsonargparse lets it through
            raise InputError(key, "is null; give it a value, or leave it out")
        for value in _scalars(leaf):
            # arguments of callbacks and the like, inside a leaf, may be infinite
            _check(key, value, finite=section in SECTIONS or (section == "trainer" and value is leaf))


def _check(key: str, value: Any, *, finite: bool) -> None:
    if isinstance(value, str) and "\0" in value:
        raise InputError(key, f"holds a null byte: {value!r}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if isinstance(value, float):
        if finite and not math.isfinite(value):
            raise InputError(key, f"must be a finite number, is {value}")
    elif abs(value) >= 2**63:
        raise InputError(key, "is a number beyond 64 bits; name a smaller one")
    elif key == "seed_everything" and not 0 <= value < 2**32:
        raise InputError(key, f"must be 0 to {2**32 - 1}, is {value}")


def _kind(key: str) -> Any:
    """Type of `key` in a section; None for a key of no section, and for a section that a verb does not read."""
    section, *names = key.split(".")
    kind: Any = SECTIONS.get(section) if names else None
    for name in names:
        kind = get_type_hints(kind).get(name) if is_dataclass(kind) else None
    return kind


def _scalars(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _scalars(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _scalars(item)
    else:
        yield value
