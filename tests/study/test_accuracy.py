"""Accuracies and samples in the report of a study, with numbers made by hand and with a study that ran."""

import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from laco_train.evaluation.scores import Estimate
from laco_train.settings import CollapseSettings
from laco_train.study.accuracy import accuracy_curve, accuracy_tables, question_warnings
from laco_train.study.curves import Arm, arms_of
from laco_train.study.read import read_runs
from laco_train.study.report import write_report
from laco_train.study.samples import sample_tables
from laco_train.study.settings import StudySettings
from laco_train.study.sweep import sweep_recipe
from tests.cli.runs import Project
from tests.evaluation.conftest import mini_suite
from tests.study.fake_runs import STEP, accuracies, samples, summary, write_ratios, write_run, write_study
from tests.study.studies import SHARED, study_of, write_recipe

__all__ = ["mini_suite"]


def evaluated(folder: Path, found: list[Any], *, seed: int = 0, **told: Any) -> Path:
    """A run with these accuracies."""
    values = {**summary([(0, 6.0), (300, 3.0)], **told), "evaluation": found, "samples": samples(folder.name)}
    return write_run(folder, values, seed=seed)


def arms(*folders: Path) -> list[Arm]:
    return arms_of([run for folder in folders for run in read_runs(folder)])


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a study of nine arms, two seeds each, all evaluated."""
    study = write_study(tmp_path_factory.mktemp("logs") / "study", (0, 1), steps=60, evaluated=True)
    return write_report(study, speed=False).parent


def test_seeds_share_questions_and_tasks_do_not(tmp_path: Path) -> None:
    places = [
        evaluated(
            tmp_path / f"laco-seed{seed}/version_0",
            [*accuracies("piqa", [(0, 0.5), (300, value)]), *accuracies("boolq", [(300, 0.8)], 100)],
            seed=seed,
        )
        for seed, value in enumerate((0.6, 0.7))
    ]
    (arm,) = arms(*places)
    start, end = accuracy_curve(arm, ["piqa"])
    assert (start.tokens, start.chance) == (0, 0.5)
    errors = [math.sqrt(value * (1 - value) / 400) for value in (0.6, 0.7)]
    piqa = math.sqrt((errors[0] ** 2 + errors[1] ** 2) / 2)
    assert end.tokens == 300 * STEP
    assert end.estimate == Estimate(pytest.approx(0.65), pytest.approx(piqa))
    (mean,) = accuracy_curve(arm, ["piqa", "boolq"])
    boolq = math.sqrt(0.8 * 0.2 / 100)
    assert mean.estimate == Estimate(pytest.approx(0.725), pytest.approx(math.sqrt(piqa**2 + boolq**2) / 2))
    (table,) = accuracy_tables([arm])
    assert table.header == ("arm", "layers", "tokens", "piqa", "boolq", "mean")
    assert table.rows == (
        ("laco", "22", "0", "0.500 ± 0.025°", "-", "-"),
        ("laco", "22", "9.83M", f"0.650 ± {piqa:.3f}", "0.800 ± 0.040", "0.725 ± 0.023"),
    )
    assert "piqa 400 (acc), boolq 100 (acc)" in table.about


def test_a_collapse_between_rounds_has_two_moments(tmp_path: Path) -> None:
    for number, value in ((1, 0.7), (2, 0.6)):
        evaluated(tmp_path / f"run/round_{number}", accuracies("piqa", [(0, value), (300, value + 0.1)]))
    (arm,) = arms(tmp_path / "run")
    found = [(one.tokens // STEP, one.estimate.value) for one in accuracy_curve(arm, ["piqa"])]
    assert found == [(0, 0.7), (300, pytest.approx(0.8)), (300, 0.6), (600, pytest.approx(0.7))]
    (table,) = accuracy_tables([arm])
    assert [row[3][:5] for row in table.rows] == ["0.700", "0.800", "0.600", "0.700"]
    told = arm.runs[0].samples
    assert told["trained"][0].startswith("round_2 trained") and told["original"] == ["into the sea.", "a\ntime <b>."]


def test_unlike_questions_are_told(tmp_path: Path) -> None:
    one = evaluated(tmp_path / "one", accuracies("piqa", [(0, 0.5)]))
    other = evaluated(tmp_path / "other", accuracies("piqa", [(0, 0.5)], sha="other"), strategy="sleb")
    (line,) = question_warnings(arms(one, other))
    assert line == "Accuracies on piqa do not compare, as the questions are unlike: laco | sleb."
    assert question_warnings(arms(one)) == []


def test_page_and_markdown_show_accuracies_and_samples(report: Path) -> None:
    text, page = (report / name for name in ("report.md", "index.html"))
    markdown, html = text.read_text(encoding="utf-8"), page.read_text(encoding="utf-8")
    assert [path.name for path in sorted(report.glob("accuracy_*.png"))] == [
        f"accuracy_{name}.png" for name in ("boolq", "mean", "piqa")
    ]
    assert html.count("<img") == markdown.count("![") == 4 + 3
    for words in ("Accuracy on tasks", "Sample: The river …", "laco trained says a word"):
        assert words in html and words in markdown
    assert "a time &lt;b&gt;." not in html  # the original is an arm: its own two columns say it
    assert "original collapsed says b" in html
    assert "Sample: Once | upon …" in markdown


def test_numbers_are_in_json_and_tensorboard(report: Path) -> None:
    (laco,) = [arm for arm in json.loads((report / "report.json").read_text())["arms"] if arm["name"] == "laco"]
    assert list(laco["accuracies"]) == ["piqa", "boolq", "mean"]
    assert [tokens for tokens, *_ in laco["accuracies"]["piqa"]] == [0, 30 * STEP, 60 * STEP]
    assert [tokens for tokens, *_ in laco["accuracies"]["mean"]] == [0, 60 * STEP]
    events = EventAccumulator(str(report / "tensorboard/laco-seed0")).Reload()
    assert [point.step for point in events.Scalars("accuracy/piqa")] == [0, 30 * STEP, 60 * STEP]
    level = EventAccumulator(str(report / "tensorboard/original_before_training")).Reload()
    assert not [tag for tag in level.Tags()["scalars"] if tag.startswith("accuracy")]


def test_nothing_is_shown_where_nothing_was_measured(tmp_path: Path) -> None:
    page = write_report(write_study(tmp_path / "study", steps=12), speed=False)
    text = page.read_text(encoding="utf-8") + (page.parent / "report.md").read_text(encoding="utf-8")
    assert not re.search("[Aa]ccurac|Sample:", text)
    assert not list(page.parent.glob("accuracy*"))


def test_the_original_comes_first_whether_it_ran_or_not(tmp_path: Path) -> None:
    laco = evaluated(tmp_path / "laco", [])
    first, _ = sample_tables(arms(laco))
    assert first.rows[0] == ("original", "into the sea.", "-")
    assert first.rows[1][:2] == ("laco", "laco collapsed says a " + ("word " * 12).strip())
    whole = evaluated(tmp_path / "whole", [], strategy="none")
    _, second = sample_tables(arms(laco, whole))
    assert [row[0] for row in second.rows] == ["original", "laco"]
    assert second.rows[0][1].startswith("whole collapsed says b")


def test_a_study_of_ratios_shows_them_too(tmp_path: Path) -> None:
    study = write_ratios(tmp_path / "ratios")
    place = study / "laco-r20-seed0/version_0"
    values = json.loads((place / "summary.json").read_text())
    told = {"evaluation": accuracies("piqa", [(0, 0.7)]), "samples": samples("laco")}
    (place / "summary.json").write_text(json.dumps({**values, **told}))
    text = (write_report(study, speed=False).parent / "report.md").read_text(encoding="utf-8")
    assert "| laco-r20 | 22 | 0 | 0.700 ± 0.023 |" in text
    assert "| laco-r20 | laco collapsed says a word" in text


def test_a_study_measures_its_arms_and_reports_it(project: Project, mini_suite: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra evaluation")
    evaluation = {"tasks": ["piqa"], "at": [0.0, 1.0], "suite": str(mini_suite), "samples": True}
    write_recipe(project, {"evaluation": evaluation, "study": {"seeds": [0]}})
    whole = study_of(project, "--arms", "original,laco")
    text = (write_report(whole.study.folder, speed=False).parent / "report.md").read_text(encoding="utf-8")
    for name in ("original", "laco"):
        (run,) = read_runs(whole.run(f"{name}-seed0"))
        assert [one.tokens for one in run.accuracies] == [0, 384]
        assert f"| {name} | {run.depth} | 384 | {run.accuracies[-1].value:.3f} ± " in text
    assert text.count("## Sample: ") == 5


def test_the_choice_of_a_learning_rate_measures_losses_alone() -> None:
    evaluation = {"tasks": ["piqa"], "at": [1.0], "samples": True, "prompts": "p.txt"}
    shared = {**SHARED, "collapse": asdict(CollapseSettings(target_depth=4)), "evaluation": evaluation}
    recipe = sweep_recipe(shared, StudySettings(), 0.1)["evaluation"]
    assert (recipe["tasks"], recipe["samples"], recipe["prompts"]) == ([], False, None)


def test_a_study_of_ratios_without_training_is_evaluated_too(project: Project, mini_suite: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra evaluation")
    evaluation = {"tasks": ["piqa"], "suite": str(mini_suite), "samples": True}
    study = {"arms": {"original": {}, "tail": {}}, "seeds": [0], "ratios": [0.3]}
    changes = {"evaluation": evaluation, "study": study, "collapse": {"target_depth": None}}
    below = {key: value for key, value in SHARED.items() if key != "study"}
    write_recipe(project, {**changes, "budget": {"max_tokens": 0}}, below=below)
    whole = study_of(project)
    text = (write_report(whole.study.folder, speed=False).parent / "report.md").read_text(encoding="utf-8")
    for name in ("original", "tail-r30"):
        (run,) = read_runs(whole.run(f"{name}-seed0"))
        assert [one.tokens for one in run.accuracies] == [0]
        assert f"| {name} | {run.depth} | 0 | {run.accuracies[0].value:.3f} ± " in text
        assert set(run.samples) == {"prompts", "original", "collapsed"}


def test_a_study_refuses_tasks_that_no_arm_could_run(project: Project, mini_suite: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra evaluation")
    write_recipe(project, {"evaluation": {"tasks": ["piqua"], "suite": str(mini_suite)}})
    result = project("study", "--recipe", "s.yaml")
    assert (result.code, "evaluation.tasks: the harness has no task 'piqua'" in result.err) == (2, True)
    assert not (project.root / "lightning_logs").exists()
