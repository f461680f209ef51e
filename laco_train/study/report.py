"""The report of a comparison: page, Markdown, pictures, tables, and event files that overlay in TensorBoard."""

import csv
import io
import json
import re
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from laco_train.analysis.figures import draw
from laco_train.errors import InputError
from laco_train.study.accuracy import accuracy_curve, accuracy_tables, columns_of, question_warnings
from laco_train.study.accuracy_figures import accuracy_pictures
from laco_train.study.curves import Arm, Run, arms_of
from laco_train.study.figures import Line, curve_pictures
from laco_train.study.findings import by_depth, findings, notes, rivals_of, study_notes
from laco_train.study.journal import STUDY_FILE
from laco_train.study.locks import alone
from laco_train.study.measures import SHARES, ArmMeasures, mean_curve, measure
from laco_train.study.page import Report, write_pages
from laco_train.study.ratio_report import write_ratio_report
from laco_train.study.read import is_finished, read_json, read_runs, study_folders
from laco_train.study.samples import sample_tables
from laco_train.study.speed import Speed, Speeds, measure_speeds
from laco_train.study.tables import Table, count, loss_table, measure_table, size_table
from laco_train.study.unlike import data_warnings

CURVES, MEASURES = "curves.csv", "report.json"
_CAPTIONS = {
    "curves": "Against tokens, on a logarithmic scale that begins with 0. Beside the names: the last losses.",
    "curves_linear": "Against tokens, only the lower part of the losses; ↑: ends above it.",
    "curves_time": "Against time in training, validation and compilation aside.",
    "curves_flops": "Against the operations that training took, counted from the shape of the model.",
}
_ACCURACY_CAPTION = "Against tokens; bars are one standard error. Beside the names: the last accuracies."
_FILES = (
    "curves.csv has every point, report.json every measure; "
    "<code>tensorboard --logdir tensorboard</code> in this folder overlays the curves."
)


@dataclass(frozen=True)
class Comparison:
    """Arms and what they measure.

    Attributes:
        title: of the report.
        arms: all, the lowest final loss first; exports, which have no curve, last.
        measures: of those with curves, in the same order.
        budget: tokens that every arm with a curve has trained on.
        original: loss of the original before any training; None if unknown.
        reference: name of the original that is trained on.
        speeds: of the exports; None if they were not measured.
        notes: what a reader must know before comparing.
    """

    title: str
    arms: tuple[Arm, ...]
    measures: tuple[ArmMeasures, ...]
    budget: int
    original: float | None
    reference: str
    speeds: Speeds | None
    notes: tuple[str, ...]

    @property
    def best(self) -> list[str]:
        """Of each depth, the arm of the lowest final loss; neither the original nor random weights."""
        return [those[0].arm.name for those in by_depth(rivals_of(self.measures, self.reference))]


def write_report(folder: Path, *, speed: bool = True, trust_remote_code: bool = False) -> Path:
    """Write the report of the study in `folder` to its ``report`` folder, and return the path of the page.

    What an earlier report left there is replaced.

    Args:
        folder: of the study.
        speed: measure inference of the exports.
        trust_remote_code: run Python code that comes with them to measure it.

    Raises:
        InputError: no arm of it is finished, or a run can't be read.
    """
    with alone(folder, "report"):  # read and written by one process at a time, so that the last one's is of all runs
        runs, warnings = _finished(folder)
        title = f"Study {folder.resolve().name}"
        output, aside = folder / "report", folder / "report.partial"
        shutil.rmtree(aside, ignore_errors=True)  # left by a process that was killed
        if any(run.ratio is not None for run in runs):
            page = write_ratio_report(runs, title, warnings, aside)
        else:
            arms = arms_of(runs)
            speeds = measure_speeds(exports(arms), trust_remote_code=trust_remote_code) if speed else None
            page = write_comparison(compare(arms, title=title, speeds=speeds, warnings=warnings), aside)
        shutil.rmtree(output, ignore_errors=True)
        aside.rename(output)
    return output / page.name


def _finished(folder: Path) -> tuple[list[Run], list[str]]:
    """Finished runs of the study in `folder`, and what must be known of them before comparing."""
    places = study_folders(folder)
    finished = [place for place in places if is_finished(place)]
    runs = [run for place in finished for run in read_runs(place)]
    if not runs:
        raise InputError(str(folder), "has no finished arm to report on; let the study go on first")
    record = read_json(folder / STUDY_FILE) if (folder / STUDY_FILE).is_file() else {}
    told = study_notes(record, [place.parent.name for place in places], [place.parent.name for place in finished])
    return runs, [*data_warnings(runs), *told]


def exports(arms: Sequence[Arm]) -> list[Path]:
    """The exported model of each arm's first seed; seeds have equal shapes, so equal speed."""
    return list(dict.fromkeys(arm.runs[0].export for arm in arms if arm.runs[0].export is not None))


def compare(
    arms: Sequence[Arm],
    *,
    title: str,
    reference: str = "original",
    speeds: Speeds | None = None,
    warnings: Sequence[str] = (),
) -> Comparison:
    """Measure `arms`.

    Args:
        arms: with or without curves.
        title: of the report.
        reference: name of the arm that is the original trained on.
        speeds: of their exports.
        warnings: come before the notes found here.
    """
    curved = [arm for arm in arms if arm.budget]
    by_name = {arm.name: arm for arm in curved}
    budget = min((arm.budget for arm in curved), default=0)
    known = by_name.get(reference)
    starts = [run.points[0].loss for run in known.runs] if known is not None else []
    before = starts or [run.original for arm in curved for run in arm.runs if run.original is not None]
    original = statistics.fmean(before) if before else None
    measured = [measure(arm, budget, known, _scratch_of(arm, curved, known), original) for arm in curved]
    measured.sort(key=lambda one: one.final)
    ordered = [one.arm for one in measured] + [arm for arm in arms if not arm.budget]
    found = [*notes(ordered, budget, reference, speeds), *question_warnings(ordered)]
    return Comparison(title, tuple(ordered), tuple(measured), budget, original, reference, speeds, (*warnings, *found))


def _scratch_of(arm: Arm, curved: Sequence[Arm], reference: Arm | None) -> Arm | None:
    """The arm of random weights in the shape of `arm`; any for the reference, which inherits all from itself."""
    fits = (one for one in curved if one.runs[0].from_scratch and (arm is reference or one.depths == arm.depths))
    return next(fits, None)


def report_tables(comparison: Comparison) -> list[Table]:
    """The tables of the report."""
    c, names = comparison, [arm.name for arm in comparison.arms]
    best = tuple(names.index(name) for name in c.best)
    tables = [loss_table(c.measures, c.budget, best), measure_table(c.measures, c.budget, best)] if c.measures else []
    return [*tables, *accuracy_tables(c.arms), size_table(c.arms, c.speeds, best), *sample_tables(c.arms)]


def report_findings(comparison: Comparison) -> list[str]:
    """What was found, a sentence each."""
    c = comparison
    return findings(c.measures, c.budget, c.original, c.reference)


def write_comparison(
    comparison: Comparison, output: Path, on_picture: Callable[[int, int], None] | None = None
) -> Path:
    """Write the report to `output`, the page last, and return the path of the page.

    Args:
        comparison: what to write.
        output: folder; made if it is not there.
        on_picture: called after each picture with how many are drawn, of how many.
    """
    output.mkdir(parents=True, exist_ok=True)
    c = comparison
    lines = [_line(m.arm, plain=m.arm.name == c.reference) for m in c.measures]
    pictures = curve_pictures(lines, c.original) if lines else []
    shown = draw([*pictures, *accuracy_pictures(c.arms, c.reference)], output, on_picture)
    (output / CURVES).write_text(curves_csv(c), encoding="utf-8")
    (output / MEASURES).write_text(json.dumps(as_json(c), indent=1) + "\n", encoding="utf-8")
    _write_events(c, output / "tensorboard")
    captions = {name: _CAPTIONS.get(name, _ACCURACY_CAPTION) for name in shown}
    content = _about(c), report_findings(c), c.notes, report_tables(c), "Curves", shown, captions, _FILES
    return write_pages(Report(c.title, *content), output)


def _line(arm: Arm, *, plain: bool) -> Line:
    return Line(arm.name, mean_curve(arm), [segment.depth for segment in arm.runs[0].segments], plain)


def _about(c: Comparison) -> str:
    runs = sum(len(arm.runs) for arm in c.arms)
    text = f"{len(c.arms)} arms" + (f", {runs} runs" if runs != len(c.arms) else "")
    if c.measures:
        text += f", compared after {count(c.budget)} tokens"
    if c.original is not None:
        text += f"; the original before training has a loss of {c.original:.3f} nats per token"
    bands = " Bands are one standard deviation over seeds." if any(len(m.arm.runs) > 1 for m in c.measures) else ""
    return f"{text}.{bands}"


def curves_csv(comparison: Comparison) -> str:
    """Every validation of every run, a row each."""
    stream = io.StringIO()
    rows = csv.writer(stream, lineterminator="\n")
    rows.writerow(["arm", "seed", "run", "round", "layers", "tokens", "share_of_budget", "seconds", "flops", "loss"])
    for m in comparison.measures:
        for run in m.arm.runs:
            for number, segment in enumerate(run.segments, start=1):
                place = [m.arm.name, run.seed, run.folder, number, segment.depth]
                for p in segment.points:
                    rows.writerow([*place, p.tokens, p.tokens / comparison.budget, p.seconds, p.flops, p.loss])
    return stream.getvalue()


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Every measure, in plain types; `losses` are [tokens, mean loss] at the evaluations that all seeds share.

    `accuracies` are [tokens, mean, standard error] by task, and `mean` over tasks if they are several.
    """
    c = comparison
    by_name = {m.arm.name: m for m in c.measures}
    columns = columns_of(c.arms)
    arms = []
    for arm in c.arms:
        run, measured = arm.runs[0], by_name.get(arm.name)
        speed = None if c.speeds is None or run.export is None else c.speeds.models[run.export]
        arms.append(
            {
                "name": arm.name,
                "depth": run.depth,
                "parameters": run.parameters,
                "learning_rate": run.learning_rate,
                "seeds": [one.seed for one in arm.runs],
                "train_sha256": run.train_sha256,
                "validation_sha256": run.validation_sha256,
                "losses": [[p.tokens, p.loss] for segment in mean_curve(arm) for p in segment],
                "recovered": None if measured is None or measured.recovered is None else measured.recovered.mean,
                "inheritance": None if measured is None or measured.inheritance is None else measured.inheritance.mean,
                "tokens_to_original": [] if measured is None else [r and asdict(r) for r in measured.reached],
                "at_shares": [] if measured is None else [one and asdict(one) for one in measured.losses],
                "accuracies": {
                    name: [[one.tokens, one.estimate.value, one.estimate.error] for one in accuracy_curve(arm, tasks)]
                    for name, tasks in columns.items()
                },
                "speed": asdict(speed) if isinstance(speed, Speed) else None,
            }
        )
    device = None if c.speeds is None else c.speeds.device
    common = {"budget": c.budget, "shares": list(SHARES), "original": c.original, "device": device}
    return {**common, "findings": report_findings(c), "notes": list(c.notes), "arms": arms}


def _write_events(comparison: Comparison, output: Path) -> None:
    """A TensorBoard run for each run, all with the same tags; one more for the level of the original."""
    ends: dict[str, int] = {}
    for m in comparison.measures:
        for run in m.arm.runs:
            name = m.arm.name if len(m.arm.runs) == 1 else f"{m.arm.name}-seed{run.seed}"
            with SummaryWriter(str(output / re.sub(r"[^\w.-]", "_", name))) as writer:
                for tag, step, value, seconds in _scalars(run):
                    writer.add_scalar(tag, value, step, walltime=seconds)
                    if tag.startswith("val_loss/"):
                        ends[tag] = max(ends.get(tag, 0), step)
    if comparison.original is not None and ends:
        with SummaryWriter(str(output / "original_before_training")) as writer:
            for tag, end in ends.items():
                for step in (0, end):
                    writer.add_scalar(tag, comparison.original, step)


def _scalars(run: Run) -> list[tuple[str, int, float, float | None]]:
    """(tag, step, value, seconds) of every point; steps are whole numbers, so FLOPs come in units of 10^9.

    The seconds become the event's wall time: TensorBoard's axis "Relative" is then the time in training.
    """
    found: list[tuple[str, int, float, float | None]] = []
    for p in run.points:
        found.append(("val_loss/by_tokens", p.tokens, p.loss, p.seconds))
        if p.seconds is not None:
            found.append(("val_loss/by_seconds", round(p.seconds), p.loss, p.seconds))
        if p.flops is not None:
            found.append(("val_loss/by_gigaflops", round(p.flops / 1e9), p.loss, p.seconds))
    for a in run.accuracies:
        found.append((f"accuracy/{a.task}", a.tokens, a.value, None))
    return found
