"""What finished runs left, as curves: validation loss by tokens, time and FLOPs; nothing heavy is imported."""

import json
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import yaml

from laco_train.errors import InputError
from laco_train.evaluation.record import Accuracy

_SUMMARY, _CONFIG, _PLAN = "summary.json", "config.yaml", "collapse_plan.json"
_NO_SETTING = ("seed_everything", "resume", "run", "ckpt_path", "name")
_RUN_FOLDER = re.compile(r"(?P<arm>.+?(-r(?P<percent>\d+(\.\d+)?))?)-seed(?P<seed>\d+)")


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

    @property
    def is_collapsed(self) -> bool:
        """Whether it is a collapsed model: neither the original nor a shape of random weights."""
        return not self.from_scratch and self.strategy != "none"

    @property
    def ratio(self) -> float | None:
        """Share of the parameters that a study asked it to remove; None: it named none."""
        found = _RUN_FOLDER.fullmatch(self.folder.resolve().parent.name)
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


def read_runs(folder: Path) -> list[Run]:
    """The run, export or finished runs of a study in `folder`.

    Raises:
        InputError: `folder` is none of these, or a file in it can't be read.
    """
    rounds = _rounds(folder)
    if rounds or (folder / _SUMMARY).is_file():
        return [_read_run(folder, rounds or [folder])]
    if (folder / "config.json").is_file():
        return [_read_export(folder)]
    if found := [version for version in study_folders(folder) if is_finished(version)]:
        return [run for version in found for run in read_runs(version)]
    if (folder / _CONFIG).is_file():
        raise InputError(
            str(folder), "is not finished (no summary.json); go on with fit --resume auto, or leave it out"
        )
    raise InputError(str(folder), "is no run of fit, no study and no exported model; name a folder that is")


def study_folders(folder: Path) -> list[Path]:
    """The newest run folder, finished or not, of every arm and seed of the study in `folder`, by name."""
    newest = []
    for arm in sorted(folder.glob("*-seed*")):
        versions = [path for path in arm.glob("version_*") if path.name.removeprefix("version_").isdigit()]
        if _RUN_FOLDER.fullmatch(arm.name) and versions:
            newest.append(max(versions, key=lambda path: int(path.name.removeprefix("version_"))))
    return newest


def is_finished(version: Path) -> bool:
    """Whether the run in `version` is at its end, and every round of it."""
    return all((segment / _SUMMARY).is_file() for segment in _rounds(version) or [version])


def _rounds(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("round_*") if path.name.removeprefix("round_").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("round_")))


def _read_run(folder: Path, rounds: Sequence[Path]) -> Run:
    if missing := [path for path in rounds if not (path / _SUMMARY).is_file()]:
        raise InputError(str(folder), f"{missing[0].name} is not finished (no {_SUMMARY}); let the run go on first")
    summaries = [read_json(path / _SUMMARY) for path in rounds]
    configs = [_read_config(path) for path in rounds]
    config = configs[0]
    first, last = summaries[0], summaries[-1]
    try:
        segments = joined([_segment(summary) for summary in summaries])
        data = first.get("data") or {}
        rates = {one.get("model", {}).get("optimizer", {}).get("learning_rate") for one in configs}
        name, group, seed = _named(folder, config, first["strategy"], len(segments))
        return Run(
            folder=folder,
            name=name,
            group=group,
            seed=seed,
            strategy=first["strategy"],
            from_scratch=bool(config.get("model", {}).get("from_scratch")),
            source_depth=first["source_depth"],
            depth=last["depth"],
            parameters=last["parameters"]["after"],
            source_parameters=first["parameters"]["before"],
            segments=segments,
            original=first["losses"].get("original"),
            validation_sha256=data.get("validation", {}).get("sha256"),
            train_sha256=data.get("train", {}).get("sha256"),
            learning_rate=rates.pop() if len(rates) == 1 else None,
            training_speed=last.get("tokens_per_second"),
            export=next((path for path in (folder / "export", rounds[-1] / "export") if path.is_dir()), None),
            accuracies=_accuracies(summaries, segments),
            samples=joined_samples([summary.get("samples") or {} for summary in summaries]),
        )
    except (KeyError, TypeError, IndexError) as error:
        problem = f"{_SUMMARY} is not what fit writes ({type(error).__name__}: {error}); name another run"
        raise InputError(str(folder), problem) from None


def _segment(summary: dict[str, Any]) -> Segment:
    values = summary["validation"]
    timed = bool(values[-1].get("seconds"))  # 0 at the end: too short to be timed, as 0 FLOPs were not counted
    points = [Point(p["tokens"], p["loss"], p["seconds"] if timed else None) for p in values]
    return Segment(summary["depth"], tuple(points), summary.get("flops_per_token") or None)


def _accuracies(summaries: Sequence[dict[str, Any]], segments: Sequence[Segment]) -> tuple[Accuracy, ...]:
    found: list[Accuracy] = []
    for summary, segment in zip(summaries, segments, strict=True):
        later = segment.points[0].tokens - summary["validation"][0]["tokens"]
        kept = [Accuracy(**values) for values in summary.get("evaluation") or []]
        found += [replace(one, tokens=one.tokens + later) for one in kept]
    return tuple(found)


def joined_samples(rounds: Sequence[dict[str, list[str]]]) -> dict[str, list[str]]:
    """`samples` of several rounds as those of one run, from the first model to the last."""
    first = {name: texts for name, texts in rounds[0].items() if name == "original"}
    return {**{name: texts for name, texts in rounds[-1].items() if name != "original"}, **first}


def joined(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """`segments` as one curve: each goes on where the last ended, in tokens, seconds and FLOPs.

    A segment that counts from its own start is shifted; one that counts over all rounds already is left as it is.
    FLOPs are made here, since each segment has its own cost of a token. What one segment does not know ends with it.
    """
    done: list[Segment] = []
    last = Point(0, 0.0, 0.0, 0.0)
    for segment in segments:
        start, cost = segment.points[0], segment.flops_per_token
        later = last.tokens if start.tokens < last.tokens else 0
        longer = last.seconds
        if longer is not None and start.seconds is not None and start.seconds >= longer:
            longer = 0.0
        points = []
        for p in segment.points:
            seconds = None if longer is None or p.seconds is None else p.seconds + longer
            flops = None if last.flops is None or cost is None else last.flops + (p.tokens - start.tokens) * cost
            points.append(Point(p.tokens + later, p.loss, seconds, flops))
        done.append(replace(segment, points=tuple(points)))
        last = points[-1]
    return tuple(done)


def _named(folder: Path, config: dict[str, Any], strategy: str, rounds: int) -> tuple[str, str, int | None]:
    """Name, group and seed of a run."""
    place = folder.resolve()
    if found := _RUN_FOLDER.fullmatch(place.parent.name):
        return found["arm"], f"{place.parent.parent}/{found['arm']}", int(found["seed"])
    seed = config.get("seed_everything")
    data = {key: value for key, value in config.get("data", {}).items() if key != "seed"}
    trainer = {
        key: value for key, value in config.get("trainer", {}).items() if key not in ("logger", "default_root_dir")
    }
    rest = {key: value for key, value in config.items() if key not in _NO_SETTING}
    alike = {**rest, "data": data, "trainer": trainer}
    group = json.dumps(alike, sort_keys=True, default=str) if config else str(place)
    name = "original" if strategy == "none" else strategy if rounds == 1 else f"{strategy} in {rounds} rounds"
    if config.get("model", {}).get("from_scratch"):
        name = "scratch"
    return name, group, seed if isinstance(seed, int) else None


def _read_export(folder: Path) -> Run:
    config = read_json(folder / "config.json")
    plan = read_json(folder / _PLAN) if (folder / _PLAN).is_file() else None
    if plan is None:
        layers = config.get("num_hidden_layers", config.get("n_layer"))
        if not isinstance(layers, int):
            raise InputError(str(folder), "config.json tells no number of layers; name an export of a causal LM")
        counts = {"before": None, "after": count_stored(folder)}
        plan = {"strategy": None, "source_depth": layers, "depth": layers, "parameters": counts}
    place = folder.resolve()
    return Run(
        folder=folder,
        name=f"{place.parent.name}/{place.name}" if place.name == "export" else place.name,
        group=str(place),
        seed=None,
        strategy=plan["strategy"],
        from_scratch=False,
        source_depth=plan["source_depth"],
        depth=plan["depth"],
        parameters=plan["parameters"]["after"],
        source_parameters=plan["parameters"]["before"],
        segments=(),
        original=None,
        validation_sha256=None,
        train_sha256=None,
        learning_rate=None,
        training_speed=None,
        export=folder,
    )


def count_stored(folder: Path) -> int:
    """Parameters in the safetensors files of `folder`, from their headers alone."""
    count = 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        count += sum(prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return count


def arms_of(runs: Iterable[Run]) -> list[Arm]:
    """`runs` by group, in the order given; two groups of one name are told apart by their folders."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        known = groups.setdefault(run.group, [])
        if run.folder.resolve() not in [other.folder.resolve() for other in known]:
            known.append(run)
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
    if _RUN_FOLDER.fullmatch(place.parent.name):
        return f"{place.parent.parent.name}/{run.name}"
    return place.parent.name


def _by_folder(run: Run, parts: int) -> str:
    """The last `parts` of its path, the version of one that is part of a study aside."""
    place = run.folder.resolve()
    if found := _RUN_FOLDER.fullmatch(place.parent.name):
        place = place.parent.parent / found["arm"]
    return "/".join(place.parts[-parts:])


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; InputError if there is none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(str(path), f"can't be read ({error}); name another folder") from None
    if not isinstance(values, dict):
        raise InputError(str(path), "holds no JSON object; name another folder")
    return values


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG
    if not path.is_file():
        return {}
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise InputError(str(path), f"can't be read ({str(error).splitlines()[0]}); name another run") from None
    return values if isinstance(values, dict) else {}
