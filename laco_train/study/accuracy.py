"""Accuracies of arms by tokens: over seeds, over tasks, and as a table."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from laco_train.evaluation.record import Accuracy
from laco_train.evaluation.report import CHANCE
from laco_train.evaluation.scores import CONFIDENCE, Estimate, is_chance, mean_of
from laco_train.study.curves import Arm, Run
from laco_train.study.tables import NONE, Table, count

MEAN = "mean"


@dataclass(frozen=True)
class Moment:
    """Accuracy of an arm on a task, or its mean over tasks.

    Attributes:
        tokens: trained on before it.
        number: of measurements before it at the same tokens: 1 after a collapse between two rounds, else 0.
        estimate: over seeds.
        chance: share right of uniform guesses, none where answers are free text; None if all are.
    """

    tokens: int
    number: int
    estimate: Estimate
    chance: float | None


def task_names(arms: Sequence[Arm]) -> list[str]:
    """Tasks that any run was measured on, in their order."""
    return list(dict.fromkeys(one.task for arm in arms for run in arm.runs for one in run.accuracies))


def columns_of(arms: Sequence[Arm]) -> dict[str, list[str]]:
    """What tables and figures show, by name: each task, and the mean of all if they are several."""
    names = task_names(arms)
    return {name: [name] for name in names} | ({MEAN: names} if len(names) > 1 else {})


def accuracy_curve(arm: Arm, tasks: Sequence[str]) -> list[Moment]:
    """Mean accuracy of `arm` over `tasks`, each counting the same, where all its seeds were measured on all of them.

    Seeds answer the same questions, so their mean has the error of one of them (the root of the mean square).
    """
    measured = [_by_place(run, task) for run in arm.runs for task in tasks]
    places = [place for place in measured[0] if all(place in other for other in measured)] if measured else []
    found = []
    for place in places:
        each = [[_by_place(run, task)[place] for run in arm.runs] for task in tasks]
        chances = [seeds[0].chance for seeds in each]
        chance = None if all(one is None for one in chances) else fmean(one or 0.0 for one in chances)
        found.append(Moment(*place, mean_of([_over_seeds(seeds) for seeds in each]), chance))
    return found


def _by_place(run: Run, task: str) -> dict[tuple[int, int], Accuracy]:
    """Accuracies on `task` by tokens and number, see `Moment`."""
    seen: Counter[int] = Counter()
    found = {}
    for one in run.accuracies:
        if one.task == task:
            found[one.tokens, seen[one.tokens]] = one
            seen[one.tokens] += 1
    return found


def _over_seeds(seeds: Sequence[Accuracy]) -> Estimate:
    errors = [one.error for one in seeds if one.error is not None]
    error = math.sqrt(fmean(one**2 for one in errors)) if len(errors) == len(seeds) else None
    return Estimate(fmean(one.value for one in seeds), error)


def accuracy_tables(arms: Sequence[Arm]) -> list[Table]:
    """One table, a row for each arm and number of tokens; none where no arm was measured."""
    columns = columns_of(arms)
    rows: list[tuple[str, ...]] = []
    for arm in arms if columns else ():
        curves = [accuracy_curve(arm, tasks) for tasks in columns.values()]
        for place in max(curves, key=len):
            at = (place.tokens, place.number)
            cells = (next((one for one in curve if (one.tokens, one.number) == at), None) for curve in curves)
            rows.append((arm.name, ", ".join(map(str, arm.depths)), count(place.tokens), *map(accuracy_cell, cells)))
    header = ("arm", "layers", "tokens", *columns)
    return [Table("Accuracy on tasks", _about(arms), header, tuple(rows))] if rows else []


def accuracy_cell(one: Moment | None) -> str:
    """An accuracy ± its standard error, marked if it is no better than chance."""
    if one is None:
        return NONE
    error = "" if one.estimate.error is None else f" ± {one.estimate.error:.3f}"
    return f"{one.estimate.value:.3f}{error}{CHANCE if is_chance(one.estimate, one.chance) else ''}"


def _about(arms: Sequence[Arm]) -> str:
    of = {one.task: one for arm in arms for run in arm.runs for one in run.accuracies}
    asked = ", ".join(f"{name} {one.questions:,} ({one.metric})" for name, one in of.items())
    seeds = "; mean over seeds, which answer the same questions" if any(len(arm.runs) > 1 for arm in arms) else ""
    return (
        f"Share of questions answered right ± its standard error{seeds}. {CHANCE}: no better than chance, by "
        f"{CONFIDENCE} standard errors. Questions: {asked}."
    )


def question_warnings(arms: Sequence[Arm]) -> list[str]:
    """A sentence for each task of which arms answered unlike questions."""
    lines = []
    for task in task_names(arms):
        asked: dict[str, list[str]] = {}
        for arm in arms:
            for sha in dict.fromkeys(one.questions_sha256 for run in arm.runs for one in _of(run, task)):
                asked.setdefault(sha, []).append(arm.name)
        if len(asked) > 1:
            groups = " | ".join(", ".join(names) for names in asked.values())
            lines.append(f"Accuracies on {task} do not compare, as the questions are unlike: {groups}.")
    return lines


def _of(run: Run, task: str) -> list[Accuracy]:
    return [one for one in run.accuracies if one.task == task]
