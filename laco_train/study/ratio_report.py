"""The report of a study over pruning ratios: page, Markdown, pictures, a table and every measure."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from laco_train.analysis.figures import draw
from laco_train.study.accuracy import accuracy_tables, question_warnings
from laco_train.study.curves import Run, arms_of
from laco_train.study.page import Report, write_pages
from laco_train.study.ratio_accuracy import MeanAccuracies, accuracy_json, mean_accuracies
from laco_train.study.ratio_accuracy_figures import mean_accuracy_pictures
from laco_train.study.ratio_accuracy_tables import accuracy_findings, accuracy_notes, mean_accuracy_tables
from laco_train.study.ratio_figures import ratio_pictures
from laco_train.study.ratio_tables import levels_of, ratio_findings, ratio_tables, ratios_csv
from laco_train.study.ratios import OverRatios, over_ratios, perplexity
from laco_train.study.samples import sample_tables
from laco_train.study.tables import count
from laco_train.study.unlike import depth_warning

_FILES = "ratios.csv has every arm at every ratio, report.json the same and what is said here."
_SCALES = {
    "perplexity": ", on a logarithmic scale.",
    "loss": ": the lower part; ↑: ends above it.",
    "accuracy": "; bars are one standard error, and arms stand side by side.",
}


def write_ratio_report(runs: Sequence[Run], title: str, warnings: Sequence[str], output: Path) -> Path:
    """Write the report of `runs` to `output`, the page last, and return the path of the page.

    Args:
        runs: finished; those with a ratio, and the original.
        title: of the report.
        warnings: come before the notes found here.
        output: folder; made if it is not there.
    """
    output.mkdir(parents=True, exist_ok=True)
    arms = arms_of(runs)
    found, means = over_ratios(runs), mean_accuracies(runs)
    told = [*ratio_findings(found), *accuracy_findings(found, means)]
    notes = [*warnings, *depth_warning(runs), *question_warnings(arms), *accuracy_notes(means)]
    (output / "ratios.csv").write_text(ratios_csv(found, means), encoding="utf-8")
    values = as_json(found, means, told, notes)
    (output / "report.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    shown = draw([*ratio_pictures(found), *mean_accuracy_pictures(found, means)], output)
    captions = {name: _caption(name) for name in shown}
    tables = [*ratio_tables(found), *mean_accuracy_tables(found, means), *accuracy_tables(arms), *sample_tables(arms)]
    content = _about(found), told, notes, tables, "Over ratios", shown, captions, _FILES
    return write_pages(Report(title, *content), output)


def _caption(name: str) -> str:
    what, _, when = name.partition("_")
    scale = _SCALES[what]
    training = "right after the collapse" if when == "before" else "after training"
    return f"{what.capitalize()} {training}{scale} Beside the names: the values at the largest ratio."


def _about(found: OverRatios) -> str:
    trained = f"before and after training on {count(found.tokens)} tokens" if found.tokens else "without training"
    return f"{len(found.lines)} arms at {len(found.ratios)} pruning ratios, {trained}."


def as_json(found: OverRatios, means: MeanAccuracies, told: Sequence[str], notes: Sequence[str]) -> dict[str, Any]:
    """Every measure, in plain types; values are of the loss in nats per token, over seeds.

    Args:
        found: losses.
        means: accuracies; no key tells of them where none was measured.
        told: what was found, in sentences.
        notes: what must be known before comparing.
    """
    levels = []
    for name, level in levels_of(found):
        values = {
            key: value and {**asdict(value), "perplexity": perplexity(value.mean)}
            for key, value in level.values.items()
        }
        right = {"accuracies": accuracy_json(means, name, level.ratio)} if means.quantities else {}
        levels.append({"arm": name, **asdict(level), "values": values, **right})
    return {
        "tokens": found.tokens,
        "ratios": list(found.ratios),
        **({"accuracy_tasks": list(means.tasks)} if means.quantities else {}),
        "findings": list(told),
        "notes": list(notes),
        "levels": levels,
    }
