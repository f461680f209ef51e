"""Studies over pruning ratios: which runs they are, and what they measure."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from laco_train.errors import InputError
from laco_train.settings import ModelSettings
from laco_train.study.depths import depth_at, depths_at
from laco_train.study.journal import STUDY_FILE
from laco_train.study.outcome import print_outcome
from laco_train.study.ratios import QUANTITIES
from laco_train.study.read import read_runs
from laco_train.study.settings import StudySettings
from laco_train.study.tasks import tasks
from tests.cli.runs import Project
from tests.study.fake_runs import summary as summary_of
from tests.study.fake_runs import write_run
from tests.study.studies import SHARED, Outcome, study_of, write_recipe
from tests.study.test_run import refuse, refused

BELOW: dict[str, Any] = {
    **SHARED,
    "study": {"arms": {"original": {}, "laco": {}, "tail": {}}, "ratios": [0.3, 0.1], "seeds": [0]},
    "collapse": {**SHARED["collapse"], "target_depth": None},
    "budget": {"max_tokens": 0, "evaluate_at": [0.5, 1.0]},
    "export": {"enabled": False},
}
NAMES = ["original-seed0", "laco-r10-seed0", "tail-r10-seed0", "laco-r30-seed0", "tail-r30-seed0"]


def summary(outcome: Outcome, name: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((outcome.run(name) / "summary.json").read_text())
    return values


@pytest.fixture(scope="module")
def untrained(shared_project: Project) -> Outcome:
    """A study of collapses alone."""
    write_recipe(shared_project, below=BELOW)
    return study_of(shared_project)


def test_runs_of_a_study_over_ratios() -> None:
    study = StudySettings(seeds=[0, 1], ratios=[0.27, 0.125])
    names = [task.name for task in tasks(study, ["original", "laco", "scratch"])]
    assert names[:5] == [
        "original-seed0",
        "laco-r12.5-seed0",
        "scratch-r12.5-seed0",
        "laco-r27-seed0",
        "scratch-r27-seed0",
    ]
    assert names[5:] == [name.replace("seed0", "seed1") for name in names[:5]]
    assert [task.name for task in tasks(StudySettings(), ["original", "laco"])] == ["original-seed0", "laco-seed0"]


def test_depths_are_the_nearest_whole_layer_of_all_parameters(untrained: Outcome, shared_project: Project) -> None:
    model = shared_project.root / "model"
    whole, layer = 76_192, 9_280  # with both embeddings and the last norm
    assert depths_at([0.1, 0.3], ModelSettings(str(model))) == {0.1: 5, 0.3: 4} == dict(untrained.study.depths)
    for ratio, removed in ((0.001, 1), (0.18, 1), (0.185, 2), (0.6, 5)):
        assert depth_at(ratio, whole, layer, 6) == 6 - removed
    plans = {name: summary(untrained, name)["parameters"] for name in NAMES}
    assert {plan["before"] for plan in plans.values()} == {whole}
    assert [plan["before"] - plan["after"] for plan in plans.values()] == [0, layer, layer, 2 * layer, 2 * layer]


def test_without_training_a_run_measures_its_collapse_and_takes_no_step(untrained: Outcome) -> None:
    for name in NAMES:
        values = summary(untrained, name)
        assert (values["steps"], values["tokens"], len(values["validation"])) == (0, 0, 1)
        assert values["validation"][0]["loss"] == values["losses"]["collapsed"] == values["losses"]["trained"]
        assert not list(untrained.run(name).rglob("*.ckpt"))
    first = summary(untrained, "original-seed0")["losses"]
    assert first["collapsed"] == pytest.approx(first["original"])
    assert len({summary(untrained, name)["losses"]["collapsed"] for name in NAMES}) == len(NAMES)


def test_each_is_a_run_of_the_journal(untrained: Outcome) -> None:
    journal = json.loads((untrained.study.folder / STUDY_FILE).read_text())
    assert [(run["folder"], run["state"]) for run in journal["runs"]] == [
        (f"{name}/version_0", "finished") for name in NAMES
    ]
    assert [(run["arm"], run["ratio"]) for run in journal["runs"]][:2] == [("original", None), ("laco", 0.1)]
    assert (journal["ratios"], journal["max_tokens"]) == ([0.3, 0.1], 0)


def test_finished_runs_are_skipped_and_the_report_is_over_ratios(
    untrained: Outcome, shared_project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    again = study_of(shared_project, fit=refuse)
    assert again.lines == [f"{name}: finished before, skipped" for name in NAMES]
    print_outcome(again.study)
    assert "Warning" not in capsys.readouterr().out
    report = json.loads((again.study.folder / "report/report.json").read_text())
    found = {(one["arm"], one["ratio"]): one["values"] for one in report["levels"]}
    for arm in ("laco", "tail"):
        for percent in (10, 30):
            loss = summary(untrained, f"{arm}-r{percent}-seed0")["losses"]["collapsed"]
            assert found[arm, percent / 100]["before"]["mean"] == loss
            assert found[arm, percent / 100]["after"] is None


def test_a_small_budget_trains_and_one_rate_is_chosen_at_the_middle_ratio(project: Project) -> None:
    study = {"learning_rates": [1e-5, 0.02], "sweep_share": 0.5, "sweep_fraction": 0.3, "ratios": [0.1, 0.3, 0.4]}
    budget = {"max_tokens": 128, "evaluate_at": [1.0]}
    write_recipe(project, {"study": {**study, "arms": {"scratch": {}}}, "budget": budget}, below=BELOW)
    done = study_of(project, "--arms", "tail")
    names = [f"tail-r{percent}-seed0" for percent in (10, 30, 40)]
    assert sorted(path.name for path in done.study.folder.glob("*-seed*")) == names
    swept = [yaml.safe_load(path.read_text()) for path in done.study.logs.glob("s-sweep/*/recipe.yaml")]
    assert [recipe["collapse"]["target_depth"] for recipe in swept] == [4, 4]
    rate = json.loads((done.study.folder / STUDY_FILE).read_text())["learning_rates"]["tail"]["chosen"]
    for name, depth in zip(names, (5, 4, 3), strict=True):
        (run,) = read_runs(done.run(name))
        assert (run.depth, run.learning_rate, run.points[-1].tokens) == (depth, rate, 128)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"study": {"ratios": [0.3, 1.0]}}, "study.ratios: must be above 0 and below 1"),
        ({"study": {"ratios": [0.3, 0.3]}}, "study.ratios: names a ratio twice"),
        ({"study": {"ratios": [0.3, 0.9]}}, "study.ratios: 0.9 leaves no layer; all but one are 0.61 of"),
        ({"study": {"ratios": [0.1, 0.15]}}, "study.ratios: 0.1 and 0.15 both leave 5 layers; drop one"),
        ({"collapse": {"target_depth": 3}}, "collapse.target_depth: goes not with study.ratios"),
        ({"study": {"arms": {"tail": {"collapse": {"target_ratio": 0.5}}}}}, "study.arms.tail.collapse.target_depth: "),
        ({"study": {"ratios": []}, "collapse": {"target_depth": 3}}, "budget.max_tokens: 0 measures collapses alone"),
        ({"study": {"arms": {"scratch": {}}}}, "budget.max_tokens: 0 trains nothing, so study.arms.scratch"),
        ({"study": {"learning_rates": [0.1, 0.2]}}, "budget.max_tokens: 0 trains nothing, so there is no "),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(shared_project: Project, changes: dict[str, Any], said: str) -> None:
    write_recipe(shared_project, changes, below=BELOW)
    assert refused(shared_project).startswith(said)


def test_a_ratio_of_no_layer_left_is_told_by_the_largest_there_is() -> None:
    with pytest.raises(InputError, match=r"0\.5 leaves no layer; all but one are 0\.30"):
        depth_at(0.5, 1000, 100, 4)


def test_refinement_alone_is_no_training(tmp_path: Path) -> None:
    """The curve of such a run has one point, at the tokens that refinement read."""
    before, after = QUANTITIES
    (refined,) = read_runs(write_run(tmp_path / "refined/version_0", summary_of([(4, 5.0)])))
    assert refined.points[0].tokens > 0
    assert (before.of(refined), after.of(refined)) == (5.0, None)
    (trained,) = read_runs(write_run(tmp_path / "trained/version_0", summary_of([(4, 5.0), (6, 4.0)])))
    assert (before.of(trained), after.of(trained)) == (5.0, 4.0)
