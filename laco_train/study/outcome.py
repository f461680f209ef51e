"""The table that ends a study, and what would make its arms hard to compare."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from laco_train.study.locks import is_held
from laco_train.study.measures import recovered
from laco_train.study.read import read_runs
from laco_train.study.report import write_report
from laco_train.study.run import Study, is_finished
from laco_train.study.tasks import Task
from laco_train.study.unlike import unlike


def finished_runs(study: Study) -> Iterator[tuple[Task, dict[str, Any]]]:
    """(run, summary) of each that is finished, whichever call finished it; arms in the recipe's order."""
    for arm in study.settings.arms:
        for task in study.tasks([arm]):
            if is_finished(study, task):
                yield task, study.place(task).summary


def print_outcome(study: Study) -> None:
    """Print a row for each finished run, warnings, and where everything lies; write the report."""
    table = Table(title=f"Study {study.name}", title_style="bold")
    for name in ("arm", "seed", "layers", "parameters", "rate", "loss at 0", "at the end", "recovered"):
        table.add_column(name, justify="left" if name == "arm" else "right")
    for task, summary in finished_runs(study):
        losses = summary["losses"]
        original = losses.get("original")
        share = None if original is None else recovered(losses["collapsed"], losses["trained"], original)
        recipe = study.place(task).recipe or {}
        table.add_row(
            task.arm,
            str(task.seed),
            str(summary["depth"]),
            f"{summary['parameters']['after']:,}",
            f"{recipe['model']['optimizer']['learning_rate']:g}",
            f"{losses['collapsed']:.4f}",
            f"{losses['trained']:.4f}",
            "" if share is None else f"{100 * share:.0f}%",
        )
    console = Console(width=100)
    if table.row_count:
        console.print(table)
    if table.row_count:
        runs = [run for task, _ in finished_runs(study) for run in read_runs(study.place(task).run)]
        for line in unlike(runs):
            print(f"Warning: {line}")
        busy = [arm for arm in study.settings.arms if is_held(study.folder, arm)]
        if busy and not study.settings.ratios:
            print(f"Inference is not measured: other processes run {', '.join(busy)}; the last to end measures it.")
        trusted = study.shared["model"]["trust_remote_code"]
        print(f"Report: {write_report(study.folder, speed=not busy, trust_remote_code=trusted)}")
    print(f"Study: {study.folder}   curves: tensorboard --logdir {study.folder}", flush=True)
