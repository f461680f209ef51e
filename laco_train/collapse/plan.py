"""CollapsePlan: what was decided and why, small enough for a JSON file; every index in it counts from 0.

The plan is the only thing a search hands on: applied to its source it gives the collapsed weights again, bit for bit.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from laco_train.collapse.merge import COMPOSED, DROP, FITTED, RULES
from laco_train.collapse.plan_settings import check_settings
from laco_train.collapse.reading import build, plain
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
    """A window of layers that was tried: a merge, or for ``shortgpt``, ``angular`` and ``sleb`` a removal of all of it.

    Attributes:
        layer: index of its first layer, in the model as it then stood.
        absorbed: number of layers after it.
        similarity: cosine with the original's final hidden states; None if it was not measured.
        accepted: whether it was kept.
        seconds: time it took.
        skipped: why it was not tried, or None.
        score: what the strategy ranked it by, where that is not the similarity: a calibration loss in nats (``sleb``,
            ``greedy`` by loss), block influence (``shortgpt``), angular distance (``angular``), cosine of the states
            that enter and leave the window (``streamline``).
    """

    layer: int
    absorbed: int
    similarity: float | None
    accepted: bool
    seconds: float
    skipped: str | None = None
    score: float | None = None


@dataclass(frozen=True)
class Parameters:
    """Parameter counts before and after, tied ones once; ratio is the share removed (the paper's pruning ratio)."""

    before: int
    after: int
    ratio: float


@dataclass(frozen=True)
class Calibration:
    """What the search measured on.

    Attributes:
        samples: number of samples.
        tokens: number of tokens, padding aside.
        sha256: of the text.
        loss_before: next-token loss of the original on it, nats per token; None if it has none (single tokens, or a
            model whose head can't be run alone).
        loss_after: the same of the collapsed model, before any training.
        seconds: time that all of the search took, every threshold that was tried included; not compared.
    """

    samples: int
    tokens: int
    sha256: str
    loss_before: float | None = None
    loss_after: float | None = None
    seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Refinement:
    """What `collapse.refine` took: tokens, each as often as it was read, and seconds."""

    tokens: int
    seconds: float


NOT_REFINED = Refinement(0, 0.0)


@dataclass(frozen=True)
class Refined:
    """Weights that the source and the merges do not give, in a safetensors file beside the plan.

    Attributes:
        file: its name, without a folder; its tensors are named as in the collapsed model.
        sha256: of its bytes.
        tokens: tokens that fitting read, each as often as it was read; that of a strategy and refinement together.
        seconds: time that fitting took, all of it too.
        refinement: the part that was refinement; None in files written before it was told apart.
    """

    file: str
    sha256: str
    tokens: int
    seconds: float
    refinement: Refinement | None = None

    @classmethod
    def of(cls, weights: bytes, tokens: int, seconds: float, refinement: Refinement = NOT_REFINED) -> "Refined":
        """The record of `weights`, the content of a safetensors file."""
        digest = hashlib.sha256(weights).hexdigest()
        return cls(f"refined-{digest[:12]}.safetensors", digest, tokens, seconds, refinement)


@dataclass(frozen=True)
class Round:
    """One of the collapses that a composed plan joins.

    Attributes:
        strategy, source_depth, depth, merge_rule, merges, removed: of its own plan; layers are those of the model that
            it began with.
        trained: tokens trained on between the round before and this one; 0 for the first; None: not recorded.
    """

    strategy: str
    source_depth: int
    depth: int
    merge_rule: str
    merges: tuple[Merge, ...]
    removed: tuple[int, ...]
    trained: int | None

    @property
    def lineage(self) -> tuple[tuple[int, ...], ...]:
        """For each layer left those of the model that the round began with; see `lineage_after`."""
        return lineage_after(self.source_depth, self.merges, self.removed, dropping=self.merge_rule == DROP)


@dataclass(frozen=True)
class CollapsePlan:
    """What a collapse does to a model, or where the layers of one that was collapsed several times come from.

    Attributes:
        source: where the model came from.
        source_fingerprint: sha256 of the model that the plan belongs to, see `fingerprint`.
        dtype: type of its weights; rounding depends on it.
        strategy: how layers were chosen: a key of STRATEGIES, or ``remove`` where they were named by hand.
        round: 0 for the first collapse of a model, 1 for a collapse of what that left, and so on.
        source_depth: layers before.
        depth: layers after.
        settings: the search's settings, as the recipe gave them.
        merge_rule: ``rdsc``, ``last``, ``mean``, ``drop``; ``fitted``: the merged layers are those of `refined`;
            ``composed``: the merges are those of `rounds`, and training between them keeps the plan from being applied.
        merge_norms: whether norms merged too.
        merges: accepted merges, in order.
        removed: original indices dropped without a merge.
        candidates: every window tried, in order.
        lineage: for each surviving layer, the original indices merged into it, its own first.
        parameters: counts.
        calibration: what the search measured on; None without a search.
        refined: the file of weights that were fitted; None without any.
        refined_weights: its content, if it is at hand; neither part of the JSON file nor compared.
        rounds: of a composed plan its collapses, two or more, in order; empty for every other.
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
    refined: Refined | None = None
    refined_weights: bytes | None = field(default=None, repr=False, compare=False, metadata={"json": False})
    rounds: tuple[Round, ...] = ()

    def __post_init__(self) -> None:
        _check(self)

    @property
    def refinement(self) -> Refinement:
        """What refinement took (`collapse.refine`), a layer fitted by the strategy before it aside."""
        refined = self.refined
        if refined is None:
            return NOT_REFINED
        if refined.refinement is not None:
            return refined.refinement
        asked = (self.settings.get("refine") or {}).get("tokens", 0)
        return Refinement(refined.tokens, refined.seconds) if asked else NOT_REFINED

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, with the keys of the file."""
        values = dataclasses.asdict(self)
        del values["refined_weights"]
        return {"format_version": values.pop("format_version"), **plain(values)}

    @classmethod
    def from_dict(cls, values: Any, key: str = "collapse.plan", where: str = "the plan") -> "CollapsePlan":
        """The plan in `values`; InputError, naming `key` and `where`, for anything but a whole and consistent one."""
        if not isinstance(values, dict):
            raise InputError(key, f"{where} is no JSON object")
        if values.get("format_version") != FORMAT_VERSION:
            found = values.get("format_version")
            raise InputError(key, f"{where}: format_version is {found!r}, this release reads {FORMAT_VERSION}")
        try:
            return build(cls, values, "plan")
        except ValueError as error:
            raise InputError(key, f"{where}: {error}") from None

    def save(self, path: Path | str, *, weights: bool = True) -> None:
        """Write `path`, whole or not at all, and before it the file of refined weights, if they are at hand.

        Args:
            path: the JSON file.
            weights: False leaves the refined weights out, for a folder that holds the whole model.
        """
        target = Path(path)
        if weights and self.refined is not None and self.refined_weights is not None:
            _write(target.with_name(self.refined.file), self.refined_weights)
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        _write(target, text.encode())

    @classmethod
    def load(cls, path: Path | str) -> "CollapsePlan":
        """Read `path`, and the refined weights if their file lies beside it.

        Raises:
            InputError: `path` is missing, cut short or inconsistent, or the weights are not those of this plan.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError("collapse.plan", f"can't read {path}: {error}") from None
        except (ValueError, RecursionError) as error:
            raise InputError("collapse.plan", f"{path} is no JSON: {error}") from None
        plan = cls.from_dict(values, where=str(path))
        if plan.refined is None:
            return plan
        beside = Path(path).with_name(plan.refined.file)
        try:
            return dataclasses.replace(plan, refined_weights=beside.read_bytes())
        except FileNotFoundError:
            return plan
        except (OSError, ValueError) as error:
            raise InputError("collapse.plan", f"{beside}: {error}") from None


def _write(target: Path, content: bytes) -> None:
    aside = target.with_name(f".{target.name}.partial")
    aside.write_bytes(content)
    aside.replace(target)


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


def joined_lineages(
    first: tuple[tuple[int, ...], ...], second: tuple[tuple[int, ...], ...]
) -> tuple[tuple[int, ...], ...]:
    """The lineage of two collapses in a row: `second` names layers left by `first`, the result those before it."""
    return tuple(tuple(original for index in layer for original in first[index]) for layer in second)


def dropped_by(source_depth: int, lineage: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    """Original indices that no surviving layer holds."""
    held = {index for layer in lineage for index in layer}
    return tuple(index for index in range(source_depth) if index not in held)


def _check(plan: CollapsePlan) -> None:
    check_settings(plan.settings)
    rules = (*RULES, DROP, FITTED, COMPOSED)
    if plan.merge_rule not in rules:
        raise ValueError(f"merge_rule {plan.merge_rule!r} is not one of {', '.join(rules)}")
    held = sum(len(layer) for layer in plan.lineage)
    if plan.source_depth != held + len(plan.removed):  # before anything of that size is built
        raise ValueError(
            f"source_depth is {plan.source_depth}, but lineage and removed name {held + len(plan.removed)}"
        )
    if plan.round < 0:
        raise ValueError(f"round is {plan.round}; the first is 0")
    _check_candidates(plan)
    _check_refined(plan)
    if any(not 0 <= index < plan.source_depth for index in plan.removed):
        raise ValueError(f"removed names a layer outside 0 to {plan.source_depth - 1}")
    if plan.merge_rule == COMPOSED or plan.rounds:
        lineage = _lineage_of_rounds(plan)
    else:
        lineage = lineage_after(plan.source_depth, plan.merges, plan.removed, dropping=plan.merge_rule == DROP)
    if lineage != plan.lineage:
        raise ValueError("lineage does not follow from merges and removed")
    if plan.removed != dropped_by(plan.source_depth, lineage):
        raise ValueError("removed does not follow from merges and lineage")
    if plan.depth != len(lineage) or plan.depth < 1:
        raise ValueError(f"depth is {plan.depth}, but {len(lineage)} layers survive")


def _lineage_of_rounds(plan: CollapsePlan) -> tuple[tuple[int, ...], ...]:
    rounds = plan.rounds
    if plan.merge_rule != COMPOSED or len(rounds) < 2 or plan.merges or plan.candidates:
        raise ValueError("a composed plan has two rounds or more, which hold its merges, and no other plan has any")
    if plan.round != len(rounds) - 1:
        raise ValueError(f"round is {plan.round}, but the last of {len(rounds)} rounds is {len(rounds) - 1}")
    lineage: tuple[tuple[int, ...], ...] = tuple((index,) for index in range(plan.source_depth))
    for number, one in enumerate(rounds):
        if one.source_depth != len(lineage) or one.depth != len(one.lineage):
            raise ValueError(f"round {number} is of {one.source_depth} layers, the round before left {len(lineage)}")
        lineage = joined_lineages(lineage, one.lineage)
    return lineage


def _check_candidates(plan: CollapsePlan) -> None:
    merging = plan.strategy in ("laco", "greedy")
    least = 1 if merging else 0
    for candidate in plan.candidates:
        end = candidate.layer + candidate.absorbed
        if candidate.layer < 0 or candidate.absorbed < least or end >= plan.source_depth:
            raise ValueError(f"a candidate reaches from layer {candidate.layer} to {end} of {plan.source_depth}")
        similarity = candidate.similarity
        if similarity is not None and not -1.001 <= similarity <= 1.001:
            raise ValueError(f"a candidate has similarity {similarity}, which is no cosine")
    accepted = [(c.layer, c.absorbed, c.similarity) for c in plan.candidates if c.accepted]
    if merging and plan.candidates and accepted != [(m.layer, m.absorbed, m.similarity) for m in plan.merges]:
        raise ValueError("merges are not the accepted candidates")


def _check_refined(plan: CollapsePlan) -> None:
    refined, weights = plan.refined, plan.refined_weights
    if refined is None:
        if plan.merge_rule == FITTED or weights is not None:
            raise ValueError("refined is null, but fitted layers have their weights in a file")
        return
    if Path(refined.file).name != refined.file or not refined.file.endswith(".safetensors"):
        raise ValueError(f"refined.file {refined.file!r} is no name of a safetensors file beside the plan")
    if weights is not None and hashlib.sha256(weights).hexdigest() != refined.sha256:
        raise ValueError(f"refined weights are not those of the plan: their sha256 is not {refined.sha256}")
