"""The table that ends a study, and what would make its arms hard to compare."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

from laco_train.study.measures import recovered
from laco_train.study.report import write_report
from laco_train.study.run import Study


def finished_runs(study: Study) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(arm, seed, summary) of each finished run, whichever call finished it; arms in the recipe's order."""
    for arm in study.settings.arms:
        for seed in study.settings.seeds:
            place = study.place(arm, seed)
            if place.finished(study.recipe(arm, seed, None)):
                yield arm, seed, place.summary


def warnings(study: Study) -> list[str]:
    """Lines on what differs between finished runs and should not."""
    found = list(finished_runs(study))
    lines = []
    for role in ("validation", "train"):
        if len({summary["data"][role]["sha256"] for _, _, summary in found}) > 1:
            lines.append(f"Warning: the {role} blocks are not the same in all runs; their losses can't be compared.")
    depths = {arm: summary["depth"] for arm, _, summary in found if arm != "original"}
    if len(set(depths.values())) > 1:
        said = ", ".join(f"{arm} {depth}" for arm, depth in depths.items())
        lines.append(f"Warning: the arms don't have the same number of layers: {said}.")
    return lines


def print_outcome(study: Study) -> None:
    """Print a row for each finished run, warnings, and where everything lies; write the report."""
    table = Table(title=f"Study {study.name}", title_style="bold")
    for name in ("arm", "seed", "layers", "parameters", "rate", "loss at 0", "at the end", "recovered"):
        table.add_column(name, justify="left" if name == "arm" else "right")
    for arm, seed, summary in finished_runs(study):
        losses = summary["losses"]
        original = losses.get("original")
        share = None if original is None else recovered(losses["collapsed"], losses["trained"], original)
        recipe = study.place(arm, seed).recipe or {}
        table.add_row(
            arm,
            str(seed),
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
    for line in warnings(study):
        print(line)
    if table.row_count:
        print(f"Report: {write_report(study.folder)}")
    print(f"Study: {study.folder}   curves: tensorboard --logdir {study.folder}", flush=True)
