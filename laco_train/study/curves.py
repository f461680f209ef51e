"""Curves of finished runs: validation loss by tokens, time and FLOPs, and the arms that they are of."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from laco_train.evaluation.record import Accuracy

RUN_FOLDER = re.compile(r"(?P<arm>.+?(-r(?P<percent>\d+(\.\d+)?))?)-seed(?P<seed>\d+)")
"""Name of the folder of a run that is part of a study."""


@dataclass(frozen=True)
class Point:
    """One validation.

    Attributes:
        tokens: tokens trained on before it, over all rounds.
        loss: nats per token.
        seconds: training time before it, validation and compilation aside; None if the run did not keep it.
        flops: operations of training before it; None if the run did not count them.
    """

    tokens: int
    loss: float
    seconds: float | None = None
    flops: float | None = None


@dataclass(frozen=True)
class Segment:
    """Training from one collapse to the next, or to the end.

    Attributes:
        depth: layers that train.
        points: by rising tokens; the first is the model right after the collapse.
        flops_per_token: operations of training one token; None if not counted.
    """

    depth: int
    points: tuple[Point, ...]
    flops_per_token: float | None = None


@dataclass(frozen=True)
class Run:
    """A run of fit, or an exported folder, which has no curve.

    Attributes:
        folder: where it is.
        name: the arm's, or what tells it from others.
        group: runs with the same one differ in their seeds only.
        seed: of the run; None if unknown.
        strategy: how its layers were chosen; None if unknown.
        from_scratch: whether its weights were drawn anew.
        source_depth: layers of the original.
        depth: layers that are left.
        parameters: parameters that are left.
        source_parameters: parameters of the original; None if unknown.
        segments: one, or one a round; none for an export.
        original: validation loss of the original before any training; None if it was not measured.
        validation_sha256, train_sha256: of the blocks; None if the run did not keep it.
        learning_rate: peak; None if unknown, or if rounds differ in it.
        training_speed: tokens per second; None if unknown.
        export: folder of the exported model; None if there is none.
        accuracies: on tasks, by rising tokens, over all rounds.
        samples: `prompts`, and what the models wrote after each: `original`, `collapsed` (the last time) and `trained`,
            as far as the run kept them.
        step_tokens: of an optimizer step; 0 if unknown.
    """

    folder: Path
    name: str
    group: str
    seed: int | None
    strategy: str | None
    from_scratch: bool
    source_depth: int
    depth: int
    parameters: int
    source_parameters: int | None
    segments: tuple[Segment, ...]
    original: float | None
    validation_sha256: str | None
    train_sha256: str | None
    learning_rate: float | None
    training_speed: float | None
    export: Path | None
    accuracies: tuple[Accuracy, ...] = ()
    samples: Mapping[str, Sequence[str]] = field(default_factory=dict)
    step_tokens: float = 0.0

    @property
    def is_collapsed(self) -> bool:
        """Whether it is a collapsed model: neither the original nor a shape of random weights."""
        return not self.from_scratch and self.strategy != "none"

    @property
    def ratio(self) -> float | None:
        """Share of the parameters that a study asked it to remove; None: it named none."""
        found = RUN_FOLDER.fullmatch(self.folder.resolve().parent.name)
        return None if found is None or found["percent"] is None else float(found["percent"]) / 100

    @property
    def line(self) -> str:
        """Its name without the ratio: that of its arm at all ratios."""
        return self.name if self.ratio is None else self.name.removesuffix(f"-r{100 * self.ratio:g}")

    @property
    def points(self) -> tuple[Point, ...]:
        """Every validation, in order; at a collapse two with the same tokens, the one before it first."""
        return tuple(point for segment in self.segments for point in segment.points)


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seeds only."""

    name: str
    runs: tuple[Run, ...]

    @property
    def depths(self) -> list[int]:
        """Layers left, each number once."""
        return sorted({run.depth for run in self.runs})

    @property
    def is_rival(self) -> bool:
        """Whether it is a collapsed model."""
        return self.runs[0].is_collapsed

    @property
    def budget(self) -> int:
        """Tokens that every run of the arm has trained on; 0 for an export."""
        return min((run.points[-1].tokens for run in self.runs if run.points), default=0)


def joined(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """`segments`, each of which counts from its own start, as one curve, in tokens, seconds and FLOPs.

    FLOPs are made here, since each segment has its own cost of a token; one of refinement counts like one of training.
    What one segment does not know ends with it.
    """
    done: list[Segment] = []
    last = Point(0, 0.0, 0.0, 0.0)
    for segment in segments:
        cost = segment.flops_per_token
        points = []
        for p in segment.points:
            seconds = None if last.seconds is None or p.seconds is None else last.seconds + p.seconds
            flops = None if last.flops is None or cost is None else last.flops + p.tokens * cost
            points.append(Point(last.tokens + p.tokens, p.loss, seconds, flops))
        done.append(replace(segment, points=tuple(points)))
        last = points[-1]
    return tuple(done)


def arms_of(runs: Iterable[Run]) -> list[Arm]:
    """`runs` by group, in the order given; two groups of one name are told apart by their folders.

    A run made twice with the same seed is two arms: a mean of both would be none over seeds.
    """
    groups: dict[tuple[str, int], list[Run]] = {}
    seen: set[Path] = set()
    for run in runs:
        if run.folder.resolve() in seen:
            continue
        seen.add(run.folder.resolve())
        twins = [those for those in groups.values() if those[0].group == run.group]
        times = sum(other.seed == run.seed for those in twins for other in those)
        groups.setdefault((run.group, times), []).append(run)
    first = [those[0] for those in groups.values()]
    names = [run.name for run in first]
    longest = max((len(run.folder.resolve().parts) for run in first), default=0)
    ways: list[Callable[[Run], str]] = [_by_recipe]
    ways += [partial(_by_folder, parts=parts) for parts in range(2, longest + 1)]
    for longer in ways:
        names = [longer(run) if names.count(name) > 1 else name for run, name in zip(first, names, strict=True)]
    return [Arm(name, tuple(those)) for name, those in zip(names, groups.values(), strict=True)]


def _by_recipe(run: Run) -> str:
    """Name of the recipe, or of the run, and of the study if it is part of one."""
    place = run.folder.resolve()
    if RUN_FOLDER.fullmatch(place.parent.name):
        return f"{place.parent.parent.name}/{run.name}"
    return place.parent.name


def _by_folder(run: Run, parts: int) -> str:
    """The last `parts` of its path, the version of one that is part of a study aside."""
    place = run.folder.resolve()
    if found := RUN_FOLDER.fullmatch(place.parent.name):
        place = place.parent.parent / found["arm"]
    return "/".join(place.parts[-parts:])
