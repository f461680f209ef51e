"""An evaluation as tables, JSON, Markdown and TensorBoard's event files."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table as RichTable
from torch.utils.tensorboard import SummaryWriter

from laco_train.evaluation.groups import OF_THE_PAPER, group_of
from laco_train.evaluation.perplexity import Perplexity
from laco_train.evaluation.result import Compared, Evaluation, ModelResult
from laco_train.evaluation.scores import CONFIDENCE, Estimate, no_better_than_chance
from laco_train.files import write_whole
from laco_train.study.page import markdown_table
from laco_train.study.tables import NONE, Table, count, percent

NOISE, CHANCE = "≈", "°"
TEST = (
    f"A difference lies within noise if it is at most {CONFIDENCE} standard errors from 0: those of the differences "
    "question by question where both models had the same questions (paired), else sqrt(e_model^2 + e_baseline^2)."
)
_SAME_ANSWER_APART = 0.05
"""How far above chance always giving one answer must come for a note to say so."""


def tables(evaluation: Evaluation) -> list[Table]:
    """Accuracies by group, where tasks ran, and perplexities, where a text was named."""
    found = [_task_table(evaluation)] if evaluation.tasks else []
    if evaluation.models[0].perplexity is not None:
        found.append(_perplexity_table(evaluation))
    return found


def _task_table(evaluation: Evaluation) -> Table:
    header = ["task", "metric", "questions", "chance"]
    for model in evaluation.models:
        header += [model.name] if evaluation.baseline_of(model) is None else [model.name, "kept"]
    rows: list[tuple[str, ...]] = []
    means: list[int] = []
    for group, tasks in evaluation.groups.items():
        means.append(len(rows))
        rows.append(_mean_row(evaluation, group, tasks))
        for task in tasks:
            rows.append(_task_row(evaluation, task))
    if len(evaluation.groups) > 1:
        means.append(len(rows))
        rows.append(_mean_row(evaluation, "all", evaluation.tasks))
    return Table("Zero-shot accuracy", _about(evaluation), tuple(header), tuple(rows), tuple(means))


def _about(evaluation: Evaluation) -> str:
    about = "Accuracy ± its standard error, no examples in the prompt. A mean counts each task the same."
    if evaluation.limit is not None:
        about += f" At most {evaluation.limit:,} questions a task, evenly spaced: not to be compared with full runs."
    if evaluation.has_baseline:
        about += f" Kept: share of the accuracy of {evaluation.models[0].name}; {NOISE}: within noise. {TEST}"
    about += f" {CHANCE}: no better than chance, by {CONFIDENCE} standard errors. Groups are the paper's"
    return about + "; *: placed by laco_train, the paper names no such task."


def _task_row(evaluation: Evaluation, task: str) -> tuple[str, ...]:
    score = evaluation.score(evaluation.models[0], task)
    name = task if task in OF_THE_PAPER or group_of(task) == "other" else f"{task}*"
    cells = [name, score.metric, f"{len(score.values):,}", NONE if score.chance is None else f"{score.chance:.3f}"]
    for model in evaluation.models:
        first, *rest = _cells(evaluation.compared(model, (task,)))
        cells += [first + (CHANCE if no_better_than_chance(evaluation.score(model, task)) else ""), *rest]
    return tuple(cells)


def _mean_row(evaluation: Evaluation, name: str, tasks: tuple[str, ...]) -> tuple[str, ...]:
    cells = [f"{name}, mean of {len(tasks)}", NONE, NONE, NONE]
    for model in evaluation.models:
        cells += _cells(evaluation.compared(model, tasks))
    return tuple(cells)


def _cells(compared: Compared) -> list[str]:
    """Accuracy, and beside a baseline the share kept."""
    accuracy = _estimate(compared.estimate)
    if compared.difference is None:
        return [accuracy]
    share = NONE if compared.kept is None else percent(compared.kept)
    return [accuracy, f"{share} {NOISE}" if compared.difference.within_noise else share]


def _estimate(estimate: Estimate) -> str:
    return f"{estimate.value:.3f}" + ("" if estimate.error is None else f" ± {estimate.error:.3f}")


def _perplexity_table(evaluation: Evaluation) -> Table:
    measured = [(model, model.perplexity) for model in evaluation.models if model.perplexity is not None]
    first = measured[0][1].protocol
    about = (
        f"Windows of {first.block_length:,} tokens, stride {first.stride:,}, special tokens: {first.special_tokens}, "
        f"text sha256 {first.text[:16]}, {measured[0][1].bytes:,} bytes. Perplexities compare only between models with "
        "the same tokens; bits per byte compare across tokenizers."
    )
    header = ("model", "perplexity", "nats per token", "bits per byte", "tokens scored", "tokenizer", "tokens sha256")
    rows = tuple(
        (
            model.name,
            f"{one.perplexity:,.2f}",
            f"{one.loss:.4f}",
            f"{one.bits_per_byte:.4f}",
            f"{one.tokens:,}",
            one.protocol.tokenizer,
            one.protocol.tokens[:16],
        )
        for model, one in measured
    )
    return Table("Perplexity", about, header, rows)


def notes(evaluation: Evaluation) -> list[str]:
    """What a reader must know before comparing, a sentence each."""
    found = []
    for score in evaluation.models[0].scores:
        if score.same_answer is not None and score.same_answer > (score.chance or 0) + _SAME_ANSWER_APART:
            found.append(f"{score.task}: always giving the most frequent answer would reach {score.same_answer:.3f}.")
    tokens = {model.perplexity.protocol.tokens for model in evaluation.models if model.perplexity is not None}
    if len(tokens) > 1:
        found.append("The models' tokenizers cut the text differently: compare bits per byte, not perplexities.")
    return found


def rich_table(one: Table) -> RichTable:
    """A table for the terminal; the rows that are means are bold."""
    shown = RichTable(title=one.title, title_justify="left", box=box.SIMPLE_HEAD)
    for index, name in enumerate(one.header):
        shown.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for index, row in enumerate(one.rows):
        shown.add_row(*row, style="bold" if index in one.best else None)
    return shown


def to_json(evaluation: Evaluation) -> dict[str, Any]:
    """Every number, with the test and the versions that it hangs on; a number that is infinite becomes null."""
    return {
        "format_version": 1,
        "baseline": evaluation.models[0].name if evaluation.has_baseline else None,
        "test": TEST,
        "limit": evaluation.limit,
        "few_shot": 0,
        "device": evaluation.device,
        "versions": dict(evaluation.versions),
        "models": [_model_json(evaluation, model) for model in evaluation.models],
        "prompts": list(evaluation.prompts),
    }


def _model_json(evaluation: Evaluation, model: ModelResult) -> dict[str, Any]:
    tasks = {}
    for score in model.scores:
        tasks[score.task] = {
            "group": group_of(score.task),
            "metric": score.metric,
            **_compared_json(evaluation.compared(model, (score.task,))),
            "questions": len(score.values),
            "questions_sha256": score.questions,
            "chance": score.chance,
            "same_answer": score.same_answer,
            "no_better_than_chance": no_better_than_chance(score),
            "data": score.data,
        }
    groups = {group: _compared_json(evaluation.compared(model, names)) for group, names in evaluation.groups.items()}
    everything = _compared_json(evaluation.compared(model, evaluation.tasks)) if evaluation.tasks else None
    return {
        "name": model.name,
        "source": model.source,
        "layers": model.layers,
        "parameters": model.parameters,
        "dtype": model.dtype,
        "tasks": tasks,
        "groups": groups,
        "all": everything,
        "perplexity": None if model.perplexity is None else _perplexity_json(model.perplexity),
        "samples": list(model.written),
    }


def _compared_json(compared: Compared) -> dict[str, Any]:
    values: dict[str, Any] = {"accuracy": compared.estimate.value, "error": compared.estimate.error}
    if compared.difference is not None:
        apart = compared.difference
        values |= {
            "kept": compared.kept,
            "difference": apart.value,
            "difference_error": apart.error,
            "paired": apart.paired,
            "within_noise": apart.within_noise,
        }
    return values


def _perplexity_json(one: Perplexity) -> dict[str, Any]:
    return {
        "perplexity": one.perplexity if math.isfinite(one.perplexity) else None,
        "loss": one.loss,
        "bits_per_byte": one.bits_per_byte,
        "tokens": one.tokens,
        "bytes": one.bytes,
        "protocol": dataclasses.asdict(one.protocol),
    }


def markdown(evaluation: Evaluation) -> str:
    """The page: notes, tables, and what the models wrote, prompt by prompt."""
    models = (f"{m.name} ({m.source}): {m.layers} layers, {count(m.parameters)} parameters" for m in evaluation.models)
    versions = ", ".join(f"{name} {version}" for name, version in evaluation.versions.items())
    lines = ["# Evaluation", "", f"{evaluation.device}; {versions}.", "", *(f"- {line}" for line in models)]
    if told := notes(evaluation):
        lines += ["", *(f"> {line}  " for line in told)]
    for one in tables(evaluation):
        lines += ["", f"## {one.title}", "", one.about, "", *markdown_table(one)]
    if evaluation.prompts:
        lines += ["", "## Samples", "", "Greedy, without a chat template."]
    for index, prompt in enumerate(evaluation.prompts):
        lines += ["", f"### {' '.join(prompt.split())}", ""]
        lines += [f"- **{model.name}**: {' '.join(model.written[index].split())}" for model in evaluation.models]
    return "\n".join([*lines, ""])


def write_evaluation(evaluation: Evaluation, output: Path) -> Path:
    """Write evaluation.json, tensorboard/ with a run a model, and report.md last, whose path is returned."""
    output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(to_json(evaluation), indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(output / "evaluation.json", text + "\n")
    for model in evaluation.models:
        with SummaryWriter(str(output / "tensorboard" / model.name.replace("/", "_"))) as writer:
            for tag, value in scalars(evaluation, model).items():
                writer.add_scalar(tag, value, 0)
    page = output / "report.md"
    write_whole(page, markdown(evaluation))
    return page


def scalars(evaluation: Evaluation, model: ModelResult) -> dict[str, float]:
    """Tags and values of one model for TensorBoard: accuracy, share kept, loss and bits per byte."""
    named: dict[str, tuple[str, ...]] = {task: (task,) for task in evaluation.tasks}
    named |= {f"mean_{group}": tasks for group, tasks in evaluation.groups.items()}
    found = {}
    for name, tasks in named.items():
        compared = evaluation.compared(model, tasks)
        found[f"accuracy/{name}"] = compared.estimate.value
        if compared.kept is not None:
            found[f"kept/{name}"] = compared.kept
    if model.perplexity is not None:
        found["text/loss"] = model.perplexity.loss
        found["text/bits_per_byte"] = model.perplexity.bits_per_byte
    return found
