"""The report: what it says, what it warns of, and that its page, Markdown and tables tell the same."""

import csv
import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from laco_train.errors import InputError
from laco_train.study.curves import arms_of
from laco_train.study.figures import decades, spaced
from laco_train.study.read import read_runs
from laco_train.study.report import Comparison, compare, report_findings, report_tables, write_comparison, write_report
from laco_train.study.speed import Speed, measure_speeds
from laco_train.study.tables import count, percent
from laco_train.study.unlike import validation_warning
from tests.study.fake_runs import BUDGET, STEP, losses, summary, write_rounds, write_run, write_study


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a study of nine arms, two seeds each, and one in rounds."""
    study = write_study(tmp_path_factory.mktemp("<logs>") / "a<b>", (0, 1), rounds=True, steps=60)
    return write_report(study, speed=False).parent


def compared(*folders: Path) -> Comparison:
    return compare(arms_of([run for folder in folders for run in read_runs(folder)]), title="T")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_csv_has_every_point(report: Path) -> None:
    found = rows(report / "curves.csv")
    runs = [run for run in read_runs(report.parent)]
    assert len(found) == sum(len(run.points) for run in runs)
    assert len({(row["arm"], row["seed"]) for row in found}) == len(runs) == 19
    rounds = [row for row in found if row["arm"] == "rounds"]
    (run,) = [run for run in runs if run.name == "rounds"]
    assert [(int(r["tokens"]), float(r["loss"])) for r in rounds] == [(p.tokens, p.loss) for p in run.points]
    assert {(row["round"], row["layers"]) for row in rounds} == {("1", "22"), ("2", "15")}


def test_page_is_self_contained_and_escaped(report: Path) -> None:
    page = (report / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|@import|url\(|<script|<link", page)
    sources = re.findall(r'(?:src|srcset|href)="([^"]*)"', page)
    assert len(sources) == 2 * len(list(report.glob("*.png"))) == 8
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "a&lt;b&gt;" in page and "a<b>" not in page


def test_markdown_shows_what_the_page_shows(report: Path) -> None:
    text = (report / "report.md").read_text(encoding="utf-8")
    assert all((report / name).is_file() for name in re.findall(r"\]\((.*?\.png)\)", text))
    page = re.sub(r"<[^>]+>", " ", (report / "index.html").read_text(encoding="utf-8"))
    tables = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    assert len(tables) == 3 + 3 * 10
    for line in tables:
        for cell in line.strip("| ").split(" | "):
            assert cell.strip("*").replace("'", "&#x27;") in page


def test_the_best_of_each_depth_is_bold(report: Path) -> None:
    bold = re.findall(r"^\| \*\*(.+?)\*\* \|", (report / "report.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert bold == ["sleb", "rounds"] * 3


def test_json_holds_the_measures(report: Path) -> None:
    values = json.loads((report / "report.json").read_text())
    arms = {arm["name"]: arm for arm in values["arms"]}
    assert arms["scratch"]["inheritance"] == pytest.approx(0)
    assert arms["original"]["inheritance"] == pytest.approx(1)
    assert arms["rounds"]["inheritance"] is None  # no random weights of 15 layers
    assert arms["original"]["recovered"] is None and arms["scratch"]["recovered"] is None  # neither was collapsed
    assert arms["laco"]["losses"][0][0] == 0
    assert arms["laco"]["losses"][-1][0] == values["budget"]
    assert arms["laco"]["learning_rate"] == 3e-4


def test_arms_overlay_in_tensorboard(report: Path) -> None:
    folders = sorted((report / "tensorboard").iterdir())
    assert len(folders) == 19 + 1
    tags = ["val_loss/by_gigaflops", "val_loss/by_seconds", "val_loss/by_tokens"]
    for folder in folders:
        assert sorted(EventAccumulator(str(folder)).Reload().Tags()["scalars"]) == tags
    events = EventAccumulator(str(report / "tensorboard/laco-seed1")).Reload().Scalars("val_loss/by_tokens")
    (run,) = [run for run in read_runs(report.parent) if (run.name, run.seed) == ("laco", 1)]
    assert [(e.step, e.value, e.wall_time) for e in events] == [
        (p.tokens, pytest.approx(p.loss), pytest.approx(p.seconds)) for p in run.points
    ]


def test_a_second_report_replaces_the_first(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study", steps=12)
    (write_report(study, speed=False).parent / "old").write_text("")
    (study / "tail-seed0/version_0/summary.json").unlink()
    page = write_report(study, speed=False)
    assert not (page.parent / "old").exists()
    assert "Not finished, so left out: tail-seed0." in page.read_text(encoding="utf-8")


def test_what_study_json_says_is_told(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study", steps=12)
    tried = [{"learning_rate": rate, "loss": 3.0} for rate in (3e-4, 1e-3)]
    runs = [{"arm": "tail", "seed": 1, "state": "failed", "problem": "no memory"}, {"arm": "laco", "seed": 0}]
    rates = {"laco": {"chosen": 3e-4, "how": "sweep", "tried": tried}, "sleb": {"chosen": 1e-3, "how": "arm"}}
    (study / "study.json").write_text(json.dumps({"runs": runs, "learning_rates": rates}))
    text = (write_report(study, speed=False).parent / "report.md").read_text(encoding="utf-8")
    assert "Not finished, so left out: tail-seed1 (failed: no memory)." in text
    assert "Learning rates chosen on documents that are not reported here: laco 0.0003 of 0.0003, 0.001." in text


def test_a_study_without_a_finished_arm(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no finished arm"):
        write_report(tmp_path, speed=False)


def test_it_says_who_wins_and_that_layer_collapse_loses(tmp_path: Path) -> None:
    laco = write_run(tmp_path / "l", summary([(0, 6.0), (300, 3.0)]))
    sleb = write_run(tmp_path / "s", summary([(0, 5.0), (300, 2.75)], strategy="sleb"))
    lines = report_findings(compared(laco, sleb))
    assert lines[0] == (
        "sleb ends best of the 2 collapsed arms: 2.750 nats per token after 9.83M tokens, 0.250 below laco."
    )
    assert lines[1] == (
        "Layer Collapse loses: it ends at 3.000, 0.250 above sleb, place 2 of 2; "
        "before training it stood at 6.000, sleb at 5.000."
    )
    better = write_run(tmp_path / "b", summary([(0, 6.0), (300, 2.5)]))
    assert report_findings(compared(better, sleb)) == [
        "laco ends best of the 2 collapsed arms: 2.500 nats per token after 9.83M tokens, 0.250 below sleb."
    ]


def test_it_says_what_random_weights_beat(tmp_path: Path) -> None:
    laco = write_run(tmp_path / "l", summary([(0, 6.0), (300, 3.0)]))
    sleb = write_run(tmp_path / "s", summary([(0, 5.0), (300, 2.75)], strategy="sleb"))
    scratch = write_run(tmp_path / "r", summary([(0, 11.0), (300, 2.9)]), scratch=True)
    assert report_findings(compared(laco, sleb, scratch))[-1] == (
        "Random weights in a shape of 22 layers end at 2.900, no worse than laco."
    )


def test_a_lead_within_the_spread_is_called_so(tmp_path: Path) -> None:
    ends = {"laco": (3.0, 3.2), "sleb": (2.9, 3.1)}
    folders = [
        write_run(tmp_path / f"{arm}-seed{seed}/version_0", summary([(0, 6.0), (300, end)], strategy=arm), seed=seed)
        for arm, pair in ends.items()
        for seed, end in enumerate(pair)
    ]
    assert report_findings(compared(*folders))[0].endswith("That is within the spread over seeds.")
    table = report_tables(compared(*folders))[0]
    assert "mean ± standard deviation over seeds" in table.about
    assert table.rows[0][-1] == "3.000 ± 0.141"


def test_depths_are_not_mixed_in_silence(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / f"laco-seed{seed}/version_0", summary([(0, 6.0), (300, 3.0)], depth=depth), seed=seed)
        for seed, depth in enumerate((22, 15))
    ]
    sleb = write_run(tmp_path / "s", summary([(0, 5.0), (300, 2.75)], strategy="sleb"))
    notes = compared(*folders, sleb).notes
    assert "laco is averaged over seeds of unlike depth: 15, 22 layers." in notes
    assert any(note.startswith("The collapsed arms differ in depth") for note in notes)


def test_shares_are_of_the_shortest_run(tmp_path: Path) -> None:
    short = write_run(tmp_path / "l", summary([(0, 6.0), (150, 3.5)]))
    long = write_run(tmp_path / "s", summary([(0, 5.0), (150, 3.0), (300, 2.75)], strategy="sleb"))
    found = compared(short, long)
    assert found.budget == BUDGET // 2
    assert "The runs have unlike lengths; shares are of the shortest, 4.92M tokens." in found.notes
    assert found.measures[0].final == 3.0


def test_an_arm_without_an_evaluation_that_early_is_left_open(tmp_path: Path) -> None:
    short = write_run(tmp_path / "l", summary([(0, 6.0), (3, 5.5)]))
    late = write_run(tmp_path / "s", summary([(0, 5.0), (300, 2.75)], strategy="sleb"))
    found = compared(short, late)
    assert [m.arm.name for m in found.measures] == ["laco", "sleb"]
    assert report_tables(found)[0].rows[1][-1] == "-"
    assert report_findings(found) == ["laco ends at 5.500 nats per token after 98.3k tokens."]
    assert found.best == ["laco"]


def test_rounds_stand_beside_a_run_at_once(tmp_path: Path) -> None:
    """Whose collapse and rate are those of the first round, and whose tokens those of both."""
    rounds = write_rounds(tmp_path / "rounds/version_0")
    once = write_run(tmp_path / "once/version_0", summary(losses(6.76, 3.6, 3.2, 60)))
    write_comparison(compared(rounds, once), tmp_path / "report")
    arms = json.loads((tmp_path / "report/report.json").read_text())["arms"]
    assert {arm["name"]: (arm["depth"], arm["losses"][-1][0]) for arm in arms} == {
        "laco in 2 rounds": (15, 60 * STEP),
        "laco": (22, 60 * STEP),
    }


def test_a_share_between_two_steps_is_read_at_the_nearer_one(tmp_path: Path) -> None:
    """A hundredth of 320 steps: 3.2 of them."""
    run = write_run(tmp_path / "l", summary([(0, 6.0), (3, 5.0), (320, 3.0)]))
    table = report_tables(compared(run))[0]
    assert table.header[3] == "1% (105k)" and table.rows[0][3] == "5.000"


def test_exports_alone(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    found = compared(tiny_folder(name="small", layers=2), tiny_folder(name="large", layers=6))
    page = write_comparison(found, tmp_path / "out")
    assert [row[:2] for row in report_tables(found)[0].rows] == [("small", "2"), ("large", "6")]
    assert "<img" not in page.read_text(encoding="utf-8")
    assert len((page.parent / "curves.csv").read_text().splitlines()) == 1


def test_interpolated_losses_are_marked(tmp_path: Path) -> None:
    run = write_run(tmp_path / "l", summary([(0, 6.0), (6, 5.0), (300, 3.0)]))
    table = report_tables(compared(run))[0]
    assert table.header[-5:] == ("1% (98.3k)", "5% (492k)", "10% (983k)", "50% (4.92M)", "100% (9.83M)")
    assert table.rows[0][2:4] == ("6.000", "-")  # 1% comes before the first evaluation
    assert [cell[0] for cell in table.rows[0][4:7]] == ["≈"] * 3
    assert table.rows[0][7] == "3.000"
    assert "≈ lies between two evaluations" in table.about


def test_unlike_validation_data(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", summary([(0, 6.0), (300, 3.0)]))
    other = write_run(tmp_path / "other", summary([(0, 6.0), (300, 3.0)], strategy="sleb", sha="b" * 64))
    unknown = write_run(tmp_path / "unknown", summary([(0, 6.0), (300, 3.0)], strategy="tail", sha=None))
    read = {folder: read_runs(folder) for folder in (one, other, unknown)}
    problem = validation_warning([*read[one], *read[other]])
    assert problem is not None and problem.endswith("/one | " + f"{tmp_path.name}/other.")
    assert validation_warning([*read[one], *read[unknown]]) is None
    assert any(
        "Not known to be validated on the same data as the rest: tail" in n for n in compared(one, unknown).notes
    )
    values = json.loads((unknown / "summary.json").read_text())
    values["losses"]["original"] = 3.6
    (unknown / "summary.json").write_text(json.dumps(values))
    disagree = validation_warning([*read[one], *read_runs(unknown)])
    assert disagree is not None and "3.538 to 3.600" in disagree


def test_runs_without_time_have_no_time_axis(tmp_path: Path) -> None:
    study = tmp_path / "study"
    write_run(study / "laco-seed0/version_0", summary(losses(6.0, 4.0, 3.0, 60), timed=False))
    page = write_report(study, speed=False)
    assert not (page.parent / "curves_time.png").exists()
    assert (page.parent / "curves_flops.png").exists()
    assert "Not in the figure over time, as their runs did not keep it: laco." in page.read_text(encoding="utf-8")


def test_speeds_are_measured_in_turn(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    small, large, broken = tiny_folder(name="small", layers=2), tiny_folder(name="large", layers=6), tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    turns: list[tuple[int, int]] = []
    speeds = measure_speeds([small, large, broken], lambda done, of: turns.append((done, of)))
    one, other = speeds.models[small], speeds.models[large]
    assert isinstance(one, Speed) and isinstance(other, Speed)
    assert min(one.prefill, one.decode, other.prefill, other.decode) > 0
    assert one.gib < other.gib
    assert isinstance(speeds.models[broken], str)
    assert turns == [(done, 15) for done in range(1, 16)]


def test_memory_counts_weights_and_cache(tiny_folder: Callable[..., Path]) -> None:
    folder = tiny_folder(layers=3)
    (run,) = read_runs(folder)
    speed = measure_speeds([folder]).models[folder]
    assert isinstance(speed, Speed)
    cache = 2 * 3 * (128 + 32) * 2 * 8 * 4  # keys and values, layers, tokens, heads of 8, float32
    assert 0 <= speed.gib * 2**30 - 4 * run.parameters - cache < 1024  # tables of rotary angles besides


@given(st.lists(st.floats(0, 1), min_size=1, max_size=14).map(sorted))
def test_labels_do_not_overlap(heights: list[float]) -> None:
    placed = spaced(heights, 0.06)
    assert all(b - a >= 0.06 - 1e-9 for a, b in itertools.pairwise(placed))
    assert placed[0] >= -1e-9
    if all(b - a >= 0.06 for a, b in itertools.pairwise(heights)):
        assert placed == pytest.approx(heights)


def test_numbers_read_well() -> None:
    assert [count(n) for n in (0, 980, 32_768, 999_600, 10_200_000, 134_515_008, 1.7e9)] == [
        "0",
        "980",
        "32.8k",
        "1M",
        "10.2M",
        "135M",
        "1.7B",
    ]
    assert [percent(n) for n in (0, 0.0123, 0.0996, 0.25, 1.72, -0.0001)] == [
        "0.0%",
        "1.2%",
        "10%",
        "25%",
        "172%",
        "0.0%",
    ]


@given(st.floats(1, 1e18), st.floats(1.01, 1e6))
def test_ticks_lie_in_the_figure(low: float, factor: float) -> None:
    high = low * factor
    found = decades(low, high)
    assert found == sorted(found)
    assert all(low <= tick <= high for tick in found)
    if factor > 11:  # room for a decade
        assert len(found) >= 3 or sum(math.log10(tick).is_integer() for tick in found) >= 2
