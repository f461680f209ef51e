"""CollapsePlan: what was decided and why, small enough for a JSON file; every index in it counts from 0.

The plan is the only thing a search hands on: applied to its source it gives the collapsed weights again, bit for bit.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from laco_train.errors import InputError

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Merge:
    """An accepted merge.

    Attributes:
        layer: index of the layer that stays, in the model as it then stood.
        absorbed: number of layers after it that merge into it (or go, for ``drop``).
        similarity: cosine that it was accepted with.
    """

    layer: int
    absorbed: int
    similarity: float


@dataclass(frozen=True)
class Candidate:
    """A merge that was tried.

    Attributes:
        layer: index of its first layer, in the model as it then stood.
        absorbed: number of layers after it.
        similarity: cosine with the original's final hidden states; None if it was skipped.
        accepted: whether the merge was kept.
        seconds: time it took.
        skipped: why it was not tried, or None.
    """

    layer: int
    absorbed: int
    similarity: float | None
    accepted: bool
    seconds: float
    skipped: str | None = None


@dataclass(frozen=True)
class Parameters:
    """Parameter counts before and after, tied ones once; ratio is the share removed (the paper's pruning ratio)."""

    before: int
    after: int
    ratio: float


@dataclass(frozen=True)
class Calibration:
    """What the similarity was measured on: sample and token counts, and the sha256 of the text."""

    samples: int
    tokens: int
    sha256: str


@dataclass(frozen=True)
class CollapsePlan:
    """What a collapse does to a model.

    Attributes:
        source: where the model came from.
        source_fingerprint: sha256 of the model that the plan belongs to, see `fingerprint`.
        dtype: type of its weights; rounding depends on it.
        strategy: how layers were chosen: ``laco``, ``remove``.
        round: 0 for the first collapse of a model, 1 for a collapse of what that left, and so on.
        source_depth: layers before.
        depth: layers after.
        settings: the search's settings, as the recipe gave them.
        merge_rule: ``rdsc``, ``last``, ``mean`` or ``drop``.
        merge_norms: whether norms merged too.
        merges: accepted merges, in order.
        removed: original indices dropped without a merge.
        candidates: every merge tried, in order.
        lineage: for each surviving layer, the original indices merged into it, its own first.
        parameters: counts.
        calibration: what the similarity was measured on; None without a search.
    """

    source: str
    source_fingerprint: str
    dtype: str
    strategy: str
    round: int
    source_depth: int
    depth: int
    settings: dict[str, Any]
    merge_rule: str
    merge_norms: bool
    merges: tuple[Merge, ...]
    removed: tuple[int, ...]
    candidates: tuple[Candidate, ...]
    lineage: tuple[tuple[int, ...], ...]
    parameters: Parameters
    calibration: Calibration | None
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        _check(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, with the keys of the file."""
        values = dataclasses.asdict(self)
        return {"format_version": values.pop("format_version"), **_plain(values)}

    @classmethod
    def from_dict(cls, values: Any, key: str = "collapse.plan", where: str = "the plan") -> "CollapsePlan":
        """The plan in `values`; InputError, naming `key` and `where`, for anything but a whole and consistent one."""
        if not isinstance(values, dict):
            raise InputError(key, f"{where} is no JSON object")
        if values.get("format_version") != FORMAT_VERSION:
            found = values.get("format_version")
            raise InputError(key, f"{where}: format_version is {found!r}, this release reads {FORMAT_VERSION}")
        try:
            return _build(cls, values, "plan")
        except ValueError as error:
            raise InputError(key, f"{where}: {error}") from None

    def save(self, path: Path | str) -> None:
        """Write `path`, whole or not at all."""
        target = Path(path)
        aside = target.with_name(f".{target.name}.partial")
        aside.write_text(
            json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
        )
        aside.replace(target)

    @classmethod
    def load(cls, path: Path | str) -> "CollapsePlan":
        """Read `path`; InputError if it is missing, cut short or inconsistent."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError("collapse.plan", f"can't read {path}: {error}") from None
        except (ValueError, RecursionError) as error:
            raise InputError("collapse.plan", f"{path} is no JSON: {error}") from None
        return cls.from_dict(values, where=str(path))


def lineage_after(
    source_depth: int, merges: tuple[Merge, ...], removed: tuple[int, ...], *, dropping: bool
) -> tuple[tuple[int, ...], ...]:
    """For each surviving layer the original indices in it, after `merges` in order and then `removed`.

    Args:
        dropping: merges drop the absorbed layers (rule ``drop``) instead of joining them.

    Raises:
        ValueError: a merge reaches past the model's end as it then stands.
    """
    layers: list[tuple[int, ...]] = [(index,) for index in range(source_depth)]
    for merge in merges:
        end = merge.layer + merge.absorbed
        if merge.layer < 0 or merge.absorbed < 1 or end >= len(layers):
            raise ValueError(f"merge of {merge.absorbed} layers into {merge.layer} does not fit {len(layers)} layers")
        window = layers[merge.layer : end + 1]
        joined = window[0] if dropping else tuple(index for part in window for index in part)
        layers[merge.layer : end + 1] = [joined]
    return tuple(layer for layer in layers if layer[0] not in removed)


def dropped_by(source_depth: int, lineage: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    """Original indices that no surviving layer holds."""
    held = {index for layer in lineage for index in layer}
    return tuple(index for index in range(source_depth) if index not in held)


def _check(plan: CollapsePlan) -> None:
    if plan.merge_rule not in ("rdsc", "last", "mean", "drop"):
        raise ValueError(f"merge_rule {plan.merge_rule!r} is not one of rdsc, last, mean, drop")
    held = sum(len(layer) for layer in plan.lineage)
    if plan.source_depth != held + len(plan.removed):  # before anything of that size is built
        raise ValueError(
            f"source_depth is {plan.source_depth}, but lineage and removed name {held + len(plan.removed)}"
        )
    if plan.round < 0:
        raise ValueError(f"round is {plan.round}; the first is 0")
    _check_candidates(plan)
    if any(not 0 <= index < plan.source_depth for index in plan.removed):
        raise ValueError(f"removed names a layer outside 0 to {plan.source_depth - 1}")
    lineage = lineage_after(plan.source_depth, plan.merges, plan.removed, dropping=plan.merge_rule == "drop")
    if lineage != plan.lineage:
        raise ValueError("lineage does not follow from merges and removed")
    if plan.removed != dropped_by(plan.source_depth, lineage):
        raise ValueError("removed does not follow from merges and lineage")
    if plan.depth != len(lineage) or plan.depth < 1:
        raise ValueError(f"depth is {plan.depth}, but {len(lineage)} layers survive")


def _check_candidates(plan: CollapsePlan) -> None:
    for candidate in plan.candidates:
        end = candidate.layer + candidate.absorbed
        if candidate.layer < 0 or candidate.absorbed < 1 or end >= plan.source_depth:
            raise ValueError(f"a candidate reaches from layer {candidate.layer} to {end} of {plan.source_depth}")
        similarity = candidate.similarity
        if similarity is not None and not -1.001 <= similarity <= 1.001:
            raise ValueError(f"a candidate has similarity {similarity}, which is no cosine")
    accepted = [(c.layer, c.absorbed, c.similarity) for c in plan.candidates if c.accepted]
    if plan.candidates and accepted != [(m.layer, m.absorbed, m.similarity) for m in plan.merges]:
        raise ValueError("merges are not the accepted candidates")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _build(cls: Any, values: Any, where: str) -> Any:
    """An instance of dataclass `cls` from JSON `values`, every key present, every type right."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} is no object")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    missing = sorted(set(fields) - set(values))
    if unknown or missing:
        raise ValueError(f"{where} has unknown keys {unknown}" if unknown else f"{where} lacks {missing}")
    return cls(**{name: _read(fields[name].type, values[name], f"{where}.{name}") for name in fields})


_NESTED = {
    tuple[Merge, ...]: Merge,
    tuple[Candidate, ...]: Candidate,
}
_SCALARS: dict[Any, tuple[Any, ...]] = {
    int: (int,),
    float: (int, float),
    str: (str,),
    bool: (bool,),
    float | None: (int, float, NoneType),
    str | None: (str, NoneType),
    dict[str, Any]: (dict,),
}


def _read(kind: Any, value: Any, where: str) -> Any:
    if kind in _NESTED:
        return tuple(_build(_NESTED[kind], item, f"{where}[{i}]") for i, item in enumerate(_list(value, where)))
    if kind == tuple[int, ...]:
        return tuple(_read(int, item, f"{where}[{i}]") for i, item in enumerate(_list(value, where)))
    if kind == tuple[tuple[int, ...], ...]:
        return tuple(_read(tuple[int, ...], item, f"{where}[{i}]") for i, item in enumerate(_list(value, where)))
    if kind == Calibration | None:
        return None if value is None else _build(Calibration, value, where)
    if kind is Parameters:
        return _build(Parameters, value, where)
    allowed = _SCALARS[kind]
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        raise ValueError(f"{where} is {value!r}, which is no {getattr(kind, '__name__', kind)}")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{where} is no list")
    return value
