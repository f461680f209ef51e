"""The report over pruning ratios: its measures, its sentences, and that page, Markdown and tables tell the same."""

import csv
import json
import math
import re
from itertools import pairwise
from pathlib import Path

import pytest

from laco_train.study.curves import arms_of
from laco_train.study.ratio_figures import number, ratio_pictures
from laco_train.study.ratio_tables import ratio_findings, ratio_tables
from laco_train.study.ratios import over_ratios
from laco_train.study.read import read_runs
from laco_train.study.report import write_report
from tests.study.fake_runs import ARMS, DEPTHS, PARAMETERS, summary, write_ratios, write_run


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of nine arms, two seeds each."""
    return write_report(write_ratios(tmp_path_factory.mktemp("logs") / "study", seeds=(0, 1)), speed=False).parent


def test_csv_and_json_have_every_arm_at_every_ratio(report: Path) -> None:
    with (report / "ratios.csv").open(encoding="utf-8", newline="") as file:
        rows = {(row["arm"], float(row["ratio"])): row for row in csv.DictReader(file)}
    assert rows.keys() == {("original", 0.0), *((arm, ratio) for arm in ARMS if arm != "original" for ratio in DEPTHS)}
    runs = [run for run in read_runs(report.parent) if run.name == "sleb-r27"]
    row = rows["sleb", 0.27]
    mean = sum(run.points[0].loss for run in runs) / 2
    assert (int(row["layers"]), int(row["parameters"]), int(row["seeds"])) == (20, PARAMETERS[20], 2)
    assert float(row["removed"]) == pytest.approx(1 - PARAMETERS[20] / PARAMETERS[30])
    assert float(row["loss_before"]) == pytest.approx(mean)
    assert float(row["perplexity_before"]) == pytest.approx(math.exp(mean))
    assert float(row["deviation_after"]) == pytest.approx(0.04 / math.sqrt(2))
    values = json.loads((report / "report.json").read_text())
    told = {(one["arm"], one["ratio"]): one for one in values["levels"]}
    assert told.keys() == rows.keys()
    assert told["sleb", 0.27]["values"]["before"]["perplexity"] == pytest.approx(math.exp(mean))


def test_page_and_markdown_show_figures_and_tables_alike(report: Path) -> None:
    names = ["perplexity_before", "loss_before", "perplexity_after", "loss_after"]
    text = (report / "report.md").read_text(encoding="utf-8")
    page = (report / "index.html").read_text(encoding="utf-8")
    assert re.findall(r"\]\((.*?)\.png\)", text) == names
    assert sorted(path.stem for path in report.glob("*.png")) == sorted(names)
    assert not re.search(r"https?:|@import|url\(|<script|<link", page)
    assert page.count("data:image/png;base64,") == 2 * len(names)
    shown = re.sub(r"<[^>]+>", " ", page)
    cells = [cell for line in text.splitlines() if line.startswith("|") for cell in line.strip("| ").split(" | ")]
    assert [cell for cell in cells if "---" not in cell and cell.strip() not in shown] == []


def test_it_says_who_is_lowest_and_where_layer_collapse_stands(tmp_path: Path) -> None:
    ends = {
        "laco": {10: 3.0, 50: 7.0},
        "sleb": {10: 3.5, 50: 5.0},
        "tail": {10: 4.0, 50: 9.0},
        "scratch": {10: 1.0, 50: 1.0},
    }
    for arm, losses in ends.items():
        for percent, loss in losses.items():
            values = summary([(0, loss)], strategy="laco" if arm == "scratch" else arm, depth=DEPTHS[percent / 100])
            place = tmp_path / f"{arm}-r{percent}-seed0/version_0"
            write_run(place, values, scratch=arm == "scratch")
    found = over_ratios(read_runs(tmp_path))
    assert ratio_findings(found) == [
        "The lowest loss before training: laco at 10%; sleb at 50%.",
        "Layer Collapse before training (above the lowest): place 1 of 3 at 10% (+0.000) and 2 of 3 at 50% (+2.000).",
        "From 10% to 50% of the parameters removed, the loss before training changes: "
        "sleb +1.500, laco +4.000, tail +5.000.",
    ]
    table, sizes = ratio_tables(found)
    assert table.header == ("arm", "0%", "10%", "50%")
    assert dict(zip(table.header, table.rows[0], strict=True))["0%"] == "3.538 (34.4)"
    assert [row for row in table.rows if row[0] == "laco"] == [("laco", "", "3.000 (20.1)*", "7.000 (1,097)")]
    assert sizes.rows[1] == ("50%", "50%", "11", "67.3M")


def test_what_is_missing_or_unlike_is_told(tmp_path: Path) -> None:
    study = write_ratios(tmp_path / "study", trained=False, scratch=False, original=False)
    (study / "tail-r40-seed0/version_0/summary.json").unlink()
    write_run(study / "laco-r20-seed0/version_0", summary([(0, 6.0)], depth=20))
    text = (write_report(study, speed=False).parent / "report.md").read_text(encoding="utf-8")
    assert "without training" in text and "after training" not in text
    assert "Not finished, so left out: tail-r40-seed0." in text
    assert "The collapsed arms differ in depth at 20%, so a lower loss may be that of more layers: " in text
    assert "laco 20" in text and "at 10%, so" not in text
    (row,) = re.findall(r"^\| tail \|.*$", text, re.MULTILINE)
    assert row.split(" | ")[-2] == "-"
    assert "original | 3.538 (34.4)" in text  # as the collapsed runs measured it


def test_compare_tells_ratios_apart(tmp_path: Path) -> None:
    study = write_ratios(tmp_path / "study")
    names = [arm.name for arm in arms_of(read_runs(study))]
    assert {"laco-r10", "laco-r27", "original"} <= set(names)
    assert len(names) == len(set(names)) == 1 + 8 * len(DEPTHS)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("arms", [("sleb",), ("sleb", "tail")])
@pytest.mark.parametrize("percents", [(10,), (10, 50)])
def test_one_arm_or_one_ratio_has_room_about_it(
    tmp_path: Path, arms: tuple[str, ...], percents: tuple[int, ...]
) -> None:
    for arm in arms:
        for percent in percents:
            for seed in (0, 1):
                curve = [(0, 4.0 + seed / 10), (30, 3.0)]
                values = summary(curve, strategy=arm, depth=DEPTHS[percent / 100])
                values["losses"]["original"] = None
                write_run(tmp_path / f"{arm}-r{percent}-seed{seed}/version_0", values, seed=seed)
    for picture in ratio_pictures(over_ratios(read_runs(tmp_path))):
        loss, deviation = (4.05, 0.1 / math.sqrt(2)) if picture.name.endswith("before") else (3.0, 0.0)
        shown = math.exp if picture.name.startswith("perplexity") else float
        (axes,) = picture.draw().axes
        low, high = axes.get_ylim()
        assert low < shown(loss - deviation) and shown(loss + deviation) < high
        assert len([tick for tick in axes.get_yticks() if low <= tick <= high]) > 1
        assert len(axes.collections) == (len(arms) if deviation else 0)  # bands, or a bar where there is no width


def test_labels_below_do_not_overlap_and_unlike_depths_are_told(tmp_path: Path) -> None:
    study = write_ratios(tmp_path / "study", scratch=False)
    depth = DEPTHS[0.4] - 1
    write_run(study / "laco-r40-seed0/version_0", summary([(0, 6.0), (30, 3.0)], depth=depth))
    found = over_ratios(read_runs(study))
    for picture in ratio_pictures(found):
        (axes,) = picture.draw().axes
        places, (low, high) = axes.get_xticks(), axes.get_xlim()
        assert min(b - a for a, b in pairwise(places)) > 0.05 * (high - low)
        labels = [label.get_text().split("\n")[1] for label in axes.get_xticklabels()]
        assert labels == [str(left) for left in sorted(DEPTHS.values(), reverse=True)]  # most arms are there
    (sizes,) = (table for table in ratio_tables(found) if table.title == "What the ratios are")
    assert [row[2] for row in sizes.rows if row[0] == "40%"] == [str(depth + 1), str(depth)]
    assert len({row[1] for row in sizes.rows}) == len(sizes.rows) == len(DEPTHS) + 1


@pytest.mark.parametrize(
    ("value", "text"),
    [(5.678, "5.68"), (34.42, "34.4"), (1234.5, "1,234"), (2.5e8, "2.5e8"), (1e6, "1e6"), (math.inf, "infinite")],
)
def test_perplexities_read_well(value: float, text: str) -> None:
    assert number(value) == text
