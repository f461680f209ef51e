"""Evaluations in a model card: from the record of the run, or from an evaluation.json of the verb evaluate."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

from laco_train.errors import InputError
from laco_train.evaluation.record import Accuracy
from laco_train.files import home

KEY = "--evaluation"
_NAMED = re.compile(r"(?P<name>[^=]+)=(?P<file>.+)")
_DIGITS = {"perplexity": 2, "bits_per_byte": 4}


@dataclass(frozen=True)
class Evaluated:
    """One measure of the exported model, or of one beside it.

    Attributes:
        model: whose: ``collapsed`` and ``trained`` of the run itself, else a name in an evaluation.json.
        is_exported: whether it is that of the exported model.
        task: name of the task, or the text of a perplexity in words.
        metric: such as acc_norm or perplexity.
        value: share right, or the perplexity.
        error: standard error; None if unknown.
        about: how many questions of what, or how a text was read.
    """

    model: str
    is_exported: bool
    task: str
    metric: str
    value: float
    error: float | None
    about: str


def of_run(accuracies: Sequence[Accuracy], steps: int) -> tuple[Evaluated, ...]:
    """What a run of so many `steps` measured right after the collapse, and at its end."""
    return tuple(
        Evaluated(
            model="trained" if one.step else "collapsed",
            is_exported=one.step == steps,
            task=one.task,
            metric=one.metric,
            value=one.value,
            error=one.error,
            about=f"{one.questions:,} questions of {one.data}",
        )
        for one in accuracies
        if one.step in (0, steps)
    )


def read_evaluations(files: Sequence[str], layers: int, parameters: int) -> tuple[Evaluated, ...]:
    """What evaluation.json files say of the exported model, and of the baseline beside it.

    Args:
        files: each ``FILE`` or ``NAME=FILE``, where NAME is what the model is called in it; without, it is the only one
            there but the baseline.
        layers, parameters: of the exported model, which that one must have too.

    Raises:
        InputError: no such file or model, or one of another shape.
    """
    found: list[Evaluated] = []
    for named in files:
        match = None if home(named).exists() else _NAMED.fullmatch(named)
        name, file = (None, named) if match is None else (match["name"], match["file"])
        values = _read(home(file))
        try:
            found += _of_file(values, file, name, layers, parameters)
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(KEY, f"{file} is not what evaluate writes ({type(error).__name__}: {error})") from None
    return tuple(found)


def _read(path: Path) -> Any:
    try:
        return json.loads((path / "evaluation.json" if path.is_dir() else path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(KEY, f"{path} can't be read ({error}); name an evaluation.json of evaluate") from None


def _of_file(values: Any, file: str, name: str | None, layers: int, parameters: int) -> Iterable[Evaluated]:
    baseline, models = values["baseline"], {model["name"]: model for model in values["models"]}
    wanted = [one for one in models if one != baseline or len(models) == 1] if name is None else [name]
    if len(wanted) != 1 or wanted[0] not in models:
        which = f"has no model {name!r}" if name is not None else "holds several"
        raise InputError(KEY, f"{file} {which}; say which one it is, as NAME=FILE: {', '.join(models)}")
    mine = models[wanted[0]]
    if (mine["layers"], mine["parameters"]) != (layers, parameters):
        raise InputError(
            KEY,
            f"{wanted[0]} in {file} has {mine['layers']} layers and {mine['parameters']:,} parameters, the exported "
            f"model {layers} and {parameters:,}; name the evaluation of this one",
        )
    for model in models.values():
        if model is mine or model["name"] == baseline:
            yield from _of_model(model, model is mine)


def _of_model(model: Any, is_exported: bool) -> Iterable[Evaluated]:
    for task, one in model["tasks"].items():
        about = f"{one['questions']:,} questions of {one['data']}"
        yield Evaluated(model["name"], is_exported, task, one["metric"], one["accuracy"], one["error"], about)
    if (text := model["perplexity"]) is not None:
        protocol = text["protocol"]
        task = f"text {protocol['text'][:16]}"
        about = (
            f"{text['bytes']:,} bytes with this sha256, windows of {protocol['block_length']:,} tokens, "
            f"stride {protocol['stride']:,}"
        )
        for metric in _DIGITS:
            if text[metric] is not None:
                yield Evaluated(model["name"], is_exported, task, metric, text[metric], None, about)


def merged(earlier: Sequence[Evaluated], later: Sequence[Evaluated]) -> tuple[Evaluated, ...]:
    """Both; what is `later` takes the place of an earlier measure of the exported model on the same task."""
    again = {(one.task, one.metric) for one in later}
    kept = [one for one in earlier if not one.is_exported or (one.task, one.metric) not in again]
    return (*kept, *later)


def evaluation_section(evaluations: Sequence[Evaluated]) -> str:
    """The card's section on `evaluations`; empty where there are none."""
    if not evaluations:
        return ""
    models = list(dict.fromkeys(one.model for one in evaluations))
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for one in evaluations:
        rows.setdefault((one.task, one.metric, one.about), {})[one.model] = _number(one)
    lines = [
        "## Evaluation",
        "",
        "Accuracies are shares of questions answered right ± their standard error, in lm-evaluation-harness's wording, "
        "without examples unless the task itself has some. Perplexities compare only by the same protocol.",
        "",
        f"| task | measure | {' | '.join(models)} | measured on |",
        "|---|---|" + "---:|" * len(models) + "---|",
    ]
    for (task, metric, about), cells in rows.items():
        lines.append(f"| {task} | {metric} | {' | '.join(cells.get(model, '-') for model in models)} | {about} |")
    return "\n".join([*lines, ""])


def _number(one: Evaluated) -> str:
    digits = _DIGITS.get(one.metric, 3)
    return f"{one.value:,.{digits}f}" + ("" if one.error is None else f" ± {one.error:.{digits}f}")


def model_index(name: str, evaluations: Sequence[Evaluated]) -> dict[str, Any]:
    """The Hub's metadata on `evaluations` of the exported model; empty where there are none."""
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=one.task,
            dataset_name=f"{one.task} ({one.about})",
            metric_type=one.metric,
            metric_value=one.value,
            metric_name=one.metric if one.error is None else f"{one.metric}, standard error {one.error:.4f}",
        )
        for one in evaluations
        if one.is_exported
    ]
    return {"model-index": eval_results_to_model_index(name, results)} if results else {}
