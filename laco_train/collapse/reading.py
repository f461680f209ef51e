"""Dataclasses from and to plain JSON values, every key and every type checked."""

import dataclasses
import json
import math
from types import UnionType
from typing import Any, get_args, get_origin


def plain(value: Any) -> Any:
    """`value` with tuples as lists, as JSON has them."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def build(cls: Any, values: Any, where: str) -> Any:
    """An instance of dataclass `cls` from JSON `values`.

    A key may be missing if its field has a default: files written before the key existed stay readable. Fields outside
    of the file carry the metadata ``{"json": False}``.

    Raises:
        ValueError: naming the place under `where`: a key is unknown or missing, or a value of another type.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where} is no object")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.metadata.get("json", True)}
    unknown = sorted(set(values) - set(fields))
    missing = sorted(name for name, field in fields.items() if name not in values and _required(field))
    if unknown or missing:
        raise ValueError(f"{where} has unknown keys {unknown}" if unknown else f"{where} lacks {missing}")
    return cls(**{name: _read(fields[name].type, value, f"{where}.{name}") for name, value in values.items()})


def _required(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING


def _read(kind: Any, value: Any, where: str) -> Any:
    if get_origin(kind) is UnionType:  # X | None, in this order
        return None if value is None else _read(get_args(kind)[0], value, where)
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} is no list")
        return tuple(_read(get_args(kind)[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if dataclasses.is_dataclass(kind):
        return build(kind, value, where)
    allowed = {float: (int, float), dict[str, Any]: (dict,)}.get(kind, (kind,))
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where} is {value!r}, which is no {getattr(kind, '__name__', kind)}")
    if kind is float or isinstance(value, dict):
        _refuse_infinite(value, where)
    return value


def _refuse_infinite(value: Any, where: str) -> None:
    try:
        json.dumps(value, allow_nan=False)
        finite = isinstance(value, dict) or math.isfinite(value)
    except (ValueError, OverflowError, RecursionError, TypeError):
        finite = False
    if not finite:
        raise ValueError(f"{where} holds a number that is not finite, or what JSON has no word for")
