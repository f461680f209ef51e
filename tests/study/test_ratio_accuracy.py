"""Mean accuracies over pruning ratios: values, what is kept, who is ahead, and where there is nothing to show."""

import csv
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from laco_train.study.ratio_accuracy import MeanAccuracies, mean_accuracies
from laco_train.study.ratio_accuracy_figures import mean_accuracy_pictures
from laco_train.study.ratio_accuracy_tables import accuracy_findings, accuracy_notes, mean_accuracy_tables
from laco_train.study.ratios import over_ratios
from laco_train.study.read import read_runs
from laco_train.study.report import write_report
from laco_train.study.tables import Table
from tests.study.fake_runs import DEPTHS, accuracies, summary, write_ratios, write_run

PIQA, BOOLQ = 400, 100  # questions
# share right on (piqa, boolq) right after the collapse and after training, at each ratio in percent
RIGHT = {
    "original": {None: ((0.8, 0.6), (0.8, 0.7))},
    "laco": {10: ((0.6, 0.5), (0.7, 0.6)), 50: ((0.5, 0.4), (0.5, 0.5))},
    "sleb": {10: ((0.75, 0.6), (0.71, 0.6)), 50: ((0.55, 0.5), (0.6, 0.6))},
    "tail": {10: ((0.5, 0.5), (0.7, 0.5)), 50: ((0.5, 0.5), (0.52, 0.5))},
    "scratch": {10: ((0.9, 0.9), (0.9, 0.9))},
}
Ends = Iterable[tuple[float, float]]


def measured(ends: Ends, sha: str = "q", steps: Iterable[int] = (0, 30)) -> list[Any]:
    """Accuracies on piqa and boolq after so many steps."""
    found: list[Any] = []
    for step, (piqa, boolq) in zip(steps, ends, strict=False):
        found += [*accuracies("piqa", [(step, piqa)], PIQA, sha), *accuracies("boolq", [(step, boolq)], BOOLQ)]
    return found


def write(root: Path, arm: str, percent: float | None, found: list[Any], seed: int = 0, steps: int = 30) -> None:
    """A run that was measured so; one of 0 steps is not trained."""
    strategy = {"original": "none", "scratch": "laco"}.get(arm, arm)
    depth = 30 if percent is None else DEPTHS[percent / 100]
    values = summary([(0, 6.0), (steps, 3.0)][: 2 if steps else 1], strategy=strategy, depth=depth)
    name = f"{arm}-seed{seed}" if percent is None else f"{arm}-r{percent}-seed{seed}"
    write_run(root / name / "version_0", {**values, "evaluation": found}, seed=seed, scratch=arm == "scratch")


def write_all(root: Path, *, without: str = "") -> Path:
    """A study of `RIGHT`."""
    for arm, levels in RIGHT.items():
        for percent, ends in levels.items() if arm != without else ():
            write(root, arm, percent, measured(ends))
    return root


def read(root: Path) -> tuple[list[str], list[Table], MeanAccuracies]:
    """Sentences and tables of the study in `root`."""
    runs = read_runs(root)
    over, means = over_ratios(runs), mean_accuracies(runs)
    return accuracy_findings(over, means), mean_accuracy_tables(over, means), means


def error(piqa: float, boolq: float) -> float:
    """Of the mean of two tasks."""
    return math.sqrt(piqa * (1 - piqa) / PIQA + boolq * (1 - boolq) / BOOLQ) / 2


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(write_all(tmp_path_factory.mktemp("logs") / "study"), speed=False).parent


def test_csv_and_json_have_accuracy_error_and_share_kept(report: Path) -> None:
    with (report / "ratios.csv").open(encoding="utf-8", newline="") as file:
        rows = {(row["arm"], float(row["ratio"])): row for row in csv.DictReader(file)}
    values = json.loads((report / "report.json").read_text())
    told = {(one["arm"], one["ratio"]): one["accuracies"] for one in values["levels"]}
    assert values["accuracy_tasks"] == ["piqa", "boolq"]
    places = {(arm, (percent or 0) / 100): ends for arm, levels in RIGHT.items() for percent, ends in levels.items()}
    assert told.keys() == rows.keys() == places.keys()
    for place, ends in places.items():
        for key, (piqa, boolq) in zip(("before", "after"), ends, strict=True):
            mean = (piqa + boolq) / 2
            expected = [mean, error(piqa, boolq), mean / 0.7]  # the original's before training is 0.7
            names = (f"accuracy_{key}", f"accuracy_error_{key}", f"kept_{key}")
            assert [float(rows[place][name]) for name in names] == pytest.approx(expected)
            one = told[place][key]
            assert [one["accuracy"], one["error"], one["kept"]] == pytest.approx(expected)
            assert (one["chance"], one["no_better_than_chance"]) == (0.5, mean <= 0.5 + 1.96 * error(piqa, boolq))


def test_page_and_markdown_have_a_figure_and_a_table_of_each_moment(report: Path) -> None:
    text, page = ((report / name).read_text(encoding="utf-8") for name in ("report.md", "index.html"))
    assert re.findall(r"\]\((accuracy.*?)\.png\)", text) == ["accuracy_before", "accuracy_after"]
    assert sorted(path.stem for path in report.glob("accuracy*.png")) == ["accuracy_after", "accuracy_before"]
    for words in (
        "Mean accuracy over 2 tasks before training",
        "Mean accuracy over 2 tasks after training on 983k tokens",
        "Layer Collapse by mean accuracy over 2 tasks after training: ",
    ):
        assert words in text and words in page
    assert "## Accuracy on tasks" in text


def test_only_who_is_ahead_by_more_than_noise_has_the_star(tmp_path: Path) -> None:
    lines, (before, after), _ = read(write_all(tmp_path))
    assert before.header == ("arm", "0%", "10%", "50%")
    rows = {row[0]: row[1:] for row in before.rows}
    assert rows["original"] == ("0.700 ± 0.026 (100%)", "", "")
    assert rows["laco"] == ("", "0.550 ± 0.028° (79%)", "0.450 ± 0.027° (64%)")
    assert rows["sleb"] == ("", "0.675 ± 0.027 (96%)*", "0.525 ± 0.028° (75%)")
    assert rows["scratch"] == ("", "0.900 ± 0.017 (129%)", "-")  # random weights are no rival
    assert {row[0]: row[1] for row in after.rows}["original"] == "0.750 ± 0.025 (107%)"
    # at 10% laco and tail are 0.005 and 0.055 behind, of which the error is 0.038; at 50% they are 0.1 and 0.09
    assert [cell for row in after.rows for cell in row if cell.endswith("*")] == ["0.600 ± 0.027 (86%)*"]
    assert lines == [
        "The highest mean accuracy over 2 tasks before training: sleb at 10% (96% kept); "
        "sleb at 50% (75% kept, no better than chance, within noise of all others).",
        "Layer Collapse by mean accuracy over 2 tasks before training: place 2 of 3 at 10% (79% kept, no better than "
        "chance) and 3 of 3 at 50% (64% kept, no better than chance).",
        "The highest mean accuracy over 2 tasks after training: sleb at 10% (94% kept, within noise of all others); "
        "sleb at 50% (86% kept).",
        "Layer Collapse by mean accuracy over 2 tasks after training: place 2 of 3 at 10% (93% kept) and 3 of 3 at 50% "
        "(71% kept, no better than chance).",
    ]


def test_figures_have_bars_the_original_and_chance(tmp_path: Path) -> None:
    runs = read_runs(write_all(tmp_path))
    before, after = mean_accuracy_pictures(over_ratios(runs), mean_accuracies(runs))
    assert before.alt == "Mean accuracy over 2 tasks before training against parameters removed"
    for picture, original in ((before, 0.7), (after, 0.75)):
        (axes,) = picture.draw().axes
        texts = {text.get_text() for text in axes.texts}
        assert {f"original {original:.3f}", "chance 0.500"} <= texts
        levels = [line.get_ydata()[0] for line in axes.lines if list(line.get_xdata()) == [0, 1]]
        assert levels == [original, 0.5]
    (axes,) = before.draw().axes
    bars = sorted(tuple(path.vertices[:, 1]) for one in axes.collections for path in one.get_paths())
    ends = [RIGHT[arm][percent][0] for arm in ("laco", "sleb", "tail") for percent in (10, 50)]
    ends.append(RIGHT["scratch"][10][0])
    expected = sorted((sum(one) / 2 - error(*one), sum(one) / 2 + error(*one)) for one in ends)
    assert bars == [pytest.approx(pair) for pair in expected]
    low, high = axes.get_ylim()
    assert low < bars[0][0] and bars[-1][1] < high
    places = [tuple(path.vertices[:, 0]) for one in axes.collections for path in one.get_paths()]
    assert len(set(places)) == len(places)  # side by side


def test_levels_with_other_questions_or_tasks_are_left_out(tmp_path: Path) -> None:
    write_all(tmp_path)
    write(tmp_path, "sleb", 10, measured(RIGHT["sleb"][10], sha="other"))
    write(tmp_path, "tail", 10, accuracies("piqa", [(0, 0.9), (30, 0.9)], PIQA))
    write(tmp_path, "laco", 50, measured(RIGHT["laco"][50], sha="other"), seed=1)  # its seeds differ
    _, (before, _), means = read(tmp_path)
    rows = {row[0]: row[2:] for row in before.rows}
    assert rows["sleb"] == ("-", "0.525 ± 0.028° (75%)")
    assert rows["tail"] == ("-", "0.500 ± 0.028° (71%)")
    assert rows["laco"] == ("0.550 ± 0.028° (79%)", "-")  # alone, so without a star
    (note,) = accuracy_notes(means)
    start, _, left_out = note.rstrip(".").partition(": ")
    assert start == "Not in the mean accuracies over ratios, as other tasks or questions were measured"
    assert sorted(left_out.split(", ")) == ["laco at 50%", "sleb at 10%", "tail at 10%"]


def test_nothing_is_shown_where_the_seeds_of_every_level_differ(tmp_path: Path) -> None:
    for arm in ("laco", "sleb"):
        for seed, sha in enumerate("ab"):
            write(tmp_path, arm, 10, measured(RIGHT[arm][10], sha), seed)
    lines, tables, means = read(tmp_path)
    assert (lines, tables, means.found) == ([], [], {})
    assert accuracy_notes(means)[0].endswith("were measured: laco at 10%, sleb at 10%.")


def test_every_seed_must_have_been_measured(tmp_path: Path) -> None:
    write_all(tmp_path)
    write(tmp_path, "laco", 10, [], seed=1)
    write(tmp_path, "sleb", 10, measured([(0.85, 0.6), (0.71, 0.6)]), seed=1)
    write(tmp_path, "tail", 10, measured(RIGHT["tail"][10][:1]))  # not after training
    _, _, means = read(tmp_path)
    assert means.at("before", "laco", 0.1) is None and means.at("before", "laco", 0.5) is not None
    assert means.at("before", "tail", 0.1) is not None and means.at("after", "tail", 0.1) is None
    two = means.at("before", "sleb", 0.1)
    assert two is not None and two.estimate.value == pytest.approx((0.8 + 0.6) / 2)


def test_without_the_original_no_share_is_kept(tmp_path: Path) -> None:
    lines, (before, _), means = read(write_all(tmp_path, without="original"))
    assert means.baseline is None
    assert {row[0]: row[2] for row in before.rows}["sleb"] == "0.675 ± 0.027*"
    assert "In brackets" not in before.about
    assert lines[0].startswith("The highest mean accuracy over 2 tasks before training: sleb at 10% (0.675); ")


def test_an_original_measured_after_training_alone_is_what_shares_are_of(tmp_path: Path) -> None:
    write_all(tmp_path)
    write(tmp_path, "original", None, measured(RIGHT["original"][None][1:], steps=[30]))
    _, (before, _), _ = read(tmp_path)
    assert [row[0] for row in before.rows] == ["laco", "scratch", "sleb", "tail"]
    assert before.rows[2][2] == "0.675 ± 0.027 (90%)*"
    assert "the original's after training, 0.750" in before.about


def test_one_task_without_training(tmp_path: Path) -> None:
    for arm, value in (("laco", 0.5), ("sleb", 0.6)):
        write(tmp_path, arm, 10, accuracies("piqa", [(0, value)], PIQA), steps=0)
    lines, (table,), _ = read(tmp_path)
    assert table.title == "Accuracy on piqa before training"
    assert [row[2] for row in table.rows] == ["0.500 ± 0.025°", "0.600 ± 0.024*"]
    assert lines == [
        "The highest accuracy on piqa before training: sleb at 10% (0.600).",
        "Layer Collapse by accuracy on piqa before training: place 2 of 2 at 10% (0.500, no better than chance).",
    ]
    report = write_report(tmp_path, speed=False).parent
    assert [path.name for path in report.glob("accuracy*.png")] == ["accuracy_before.png"]


def test_guessing_finds_no_free_text(tmp_path: Path) -> None:
    free = {**accuracies("lambada", [(0, 0.0)])[0], "chance": None}
    write(tmp_path, "laco", 10, [*measured([(0.5, 0.5)]), free])
    _, (table,), means = read(tmp_path)
    assert means.chance("before") == pytest.approx((0.5 + 0.5 + 0.0) / 3)
    assert table.rows[0][2] == "0.333 ± 0.019°"  # by guesses alone
    write(tmp_path, "laco", 10, [free])
    _, (table,), means = read(tmp_path)
    assert means.chance("before") is None and table.about.count("Chance is not told") == 1
    assert (write_report(tmp_path, speed=False).parent / "accuracy_before.png").is_file()


def test_nothing_is_shown_where_nothing_was_measured(tmp_path: Path) -> None:
    report = write_report(write_ratios(tmp_path / "study"), speed=False).parent
    texts = [path.read_text(encoding="utf-8") for path in report.glob("*.*") if path.suffix != ".png"]
    assert len(texts) == 4 and not re.search("[Aa]ccurac|kept", " ".join(texts))
    assert not list(report.glob("accuracy*"))
    header = (report / "ratios.csv").read_text().splitlines()[0]
    assert header.endswith(
        "seeds,loss_before,deviation_before,perplexity_before,loss_after,deviation_after,perplexity_after"
    )
