"""Reads what finished runs, studies and exports left on the disk; nothing heavy is imported."""

import json
import struct
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import yaml

from laco_train.errors import InputError
from laco_train.evaluation.record import Accuracy
from laco_train.study.curves import RUN_FOLDER, Point, Run, Segment, joined

_SUMMARY, _CONFIG, _PLAN = "summary.json", "config.yaml", "collapse_plan.json"
_NO_SETTING = ("seed_everything", "resume", "run", "ckpt_path", "name")


def read_runs(folder: Path) -> list[Run]:
    """The run, export or finished runs of a study in `folder`.

    Raises:
        InputError: `folder` is none of these, or a file in it can't be read.
    """
    rounds = rounds_of(folder)
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
        if RUN_FOLDER.fullmatch(arm.name) and versions:
            newest.append(max(versions, key=lambda path: int(path.name.removeprefix("version_"))))
    return newest


def is_finished(version: Path) -> bool:
    """Whether the run in `version` is at its end, and every round of it."""
    return not _unfinished(version)


def _unfinished(folder: Path) -> list[Path]:
    """Rounds of a run, or the run itself, without a summary: one that stopped between rounds has all that began."""
    rounds = rounds_of(folder)
    whole = [folder] if not rounds or (folder / _CONFIG).is_file() else []
    return [part for part in (*rounds, *whole) if not (part / _SUMMARY).is_file()]


def rounds_of(folder: Path) -> list[Path]:
    """Folders of the rounds that the run in `folder` has begun, in order; none if it has no rounds."""
    found = [path for path in folder.glob("round_*") if path.name.removeprefix("round_").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("round_")))


def _read_run(folder: Path, rounds: Sequence[Path]) -> Run:
    if missing := _unfinished(folder):
        raise InputError(str(folder), f"{missing[0].name} is not finished (no {_SUMMARY}); let the run go on first")
    summaries = [read_json(path / _SUMMARY) for path in rounds]
    configs = [_read_config(path) for path in rounds]
    first, last = summaries[0], summaries[-1]
    try:
        segments = joined([_segment(summary) for summary in summaries])
        data = first.get("data") or {}
        rates = {one.get("model", {}).get("optimizer", {}).get("learning_rate") for one in configs}
        name, group, seed = _named(folder, configs, first["strategy"])
        return Run(
            folder=folder,
            name=name,
            group=group,
            seed=seed,
            strategy=first["strategy"],
            from_scratch=_from_scratch(configs),
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
            step_tokens=_step_tokens(first["validation"]),
        )
    except (KeyError, TypeError, IndexError) as error:
        problem = f"{_SUMMARY} is not what fit writes ({type(error).__name__}: {error}); name another run"
        raise InputError(str(folder), problem) from None


def _segment(summary: dict[str, Any]) -> Segment:
    values = summary["validation"]
    timed = bool(values[-1].get("seconds"))  # 0 at the end: too short to be timed, as 0 FLOPs were not counted
    points = [Point(p["tokens"], p["loss"], p["seconds"] if timed else None) for p in values]
    return Segment(summary["depth"], tuple(points), summary.get("flops_per_token") or None)


def _step_tokens(values: Sequence[dict[str, Any]]) -> float:
    steps = values[-1]["step"] - values[0]["step"]
    return (values[-1]["tokens"] - values[0]["tokens"]) / steps if steps else 0.0


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


def _from_scratch(configs: Sequence[dict[str, Any]]) -> bool:
    return bool(configs[0].get("model", {}).get("from_scratch"))


def _named(folder: Path, configs: Sequence[dict[str, Any]], strategy: str) -> tuple[str, str, int | None]:
    """Name, group and seed of a run, which has a config a round."""
    place = folder.resolve()
    if found := RUN_FOLDER.fullmatch(place.parent.name):
        return found["arm"], f"{place.parent.parent}/{found['arm']}", int(found["seed"])
    seed = configs[0].get("seed_everything")
    alike = [_without_seed(config, later=number > 0) for number, config in enumerate(configs)]
    group = json.dumps(alike, sort_keys=True, default=str) if configs[0] else str(place)
    rounds = len(configs)
    name = "original" if strategy == "none" else strategy if rounds == 1 else f"{strategy} in {rounds} rounds"
    if _from_scratch(configs):
        name = "scratch"
    return name, group, seed if isinstance(seed, int) else None


def _without_seed(config: dict[str, Any], *, later: bool) -> dict[str, Any]:
    """What runs that differ in their seeds only share; a `later` round begins with what the run itself exported."""
    model = {key: value for key, value in config.get("model", {}).items() if not (later and key == "source")}
    data = {key: value for key, value in config.get("data", {}).items() if key != "seed"}
    trainer = {
        key: value for key, value in config.get("trainer", {}).items() if key not in ("logger", "default_root_dir")
    }
    rest = {key: value for key, value in config.items() if key not in _NO_SETTING}
    return {**rest, "model": model, "data": data, "trainer": trainer}


def _read_export(folder: Path) -> Run:
    config = read_json(folder / "config.json")
    strategy, source_parameters = None, None
    if (folder / _PLAN).is_file():
        from laco_train.collapse import CollapsePlan  # it imports torch

        plan = CollapsePlan.load(folder / _PLAN)
        strategy, source_depth, depth = plan.strategy, plan.source_depth, plan.depth
        source_parameters, parameters = plan.parameters.before, plan.parameters.after
    else:
        layers = config.get("num_hidden_layers", config.get("n_layer"))
        if not isinstance(layers, int):
            raise InputError(str(folder), "config.json tells no number of layers; name an export of a causal LM")
        source_depth, depth, parameters = layers, layers, count_stored(folder)
    place = folder.resolve()
    return Run(
        folder=folder,
        name=f"{place.parent.name}/{place.name}" if place.name == "export" else place.name,
        group=str(place),
        seed=None,
        strategy=strategy,
        from_scratch=False,
        source_depth=source_depth,
        depth=depth,
        parameters=parameters,
        source_parameters=source_parameters,
        segments=(),
        original=None,
        validation_sha256=None,
        train_sha256=None,
        learning_rate=None,
        training_speed=None,
        export=folder,
    )


def count_stored(folder: Path) -> int:
    """Parameters in the safetensors files of `folder`, from their headers alone.

    Raises:
        InputError: one of them is damaged.
    """
    return sum(_count_in(path) for path in sorted(folder.glob("*.safetensors")))


def _count_in(path: Path) -> int:
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size - 8:  # else read would ask for that much memory
                raise ValueError("its header is longer than the file, as if it were a Git-LFS pointer")
            header = json.loads(file.read(length))
        return sum(prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(str(path), f"is no whole safetensors file ({reason}); copy or download it again") from None


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
