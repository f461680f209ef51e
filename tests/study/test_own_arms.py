"""A study with arms of one's own: one that is refined within the same budget, one whose layers are named."""

import json
from typing import Any

import pytest

from laco_train.study.curves import arms_of
from laco_train.study.measures import measure
from laco_train.study.read import read_runs
from laco_train.study.tables import loss_table
from tests.cli.runs import Project
from tests.study.studies import Outcome, study_of, write_recipe

REFINE = {"tokens": 160, "batch_size": 1, "learning_rate": 3e-3}
STUDY: dict[str, Any] = {
    "study": {
        "arms": {
            "original": {"model": {"optimizer": {"learning_rate": 0.005}}},
            "best": {"collapse": {"strategy": "shortgpt", "refine": REFINE}},
            "named": {"collapse": {"remove": [1, 4]}, "model": {"optimizer": {"learning_rate": 0.005}}},
        },
        "seeds": [0],
        "learning_rates": [1e-5, 0.01],
        "sweep_share": 0.5,
        "sweep_fraction": 0.3,
    },
    "export": {"enabled": False},
}


@pytest.fixture(scope="module")
def outcome(shared_project: Project) -> Outcome:
    write_recipe(shared_project, STUDY)
    return study_of(shared_project)


def tokens(outcome: Outcome, name: str) -> list[int]:
    summary = json.loads((outcome.run(name) / "summary.json").read_text())
    return [point["tokens"] for point in summary["validation"]]


def test_refinement_comes_off_the_budget(outcome: Outcome) -> None:
    """160 of 384 tokens, then four steps of 64; all arms end with the step that reaches 384."""
    assert tokens(outcome, "named-seed0")[0] == 0 and tokens(outcome, "named-seed0")[-1] == 384
    found = tokens(outcome, "best-seed0")
    assert (found[0], found[-1]) == (160, 160 + 4 * 64)


def test_layers_that_are_named_are_those_that_go(outcome: Outcome) -> None:
    assert json.loads((outcome.run("named-seed0") / "collapse_plan.json").read_text())["removed"] == [1, 4]


def test_a_rate_is_chosen_after_the_same_refinement(outcome: Outcome) -> None:
    """Half of what is left after it: two steps."""
    folder = outcome.study.logs / "s-sweep" / "best-0.01" / "version_0"
    summary = json.loads((folder / "summary.json").read_text())
    assert [point["tokens"] for point in summary["validation"]][-1] == 160 + 2 * 64
    journal = json.loads((outcome.study.folder / "study.json").read_text())
    assert journal["learning_rates"]["best"]["how"] == "sweep"


def test_the_report_says_when_an_arm_starts(outcome: Outcome) -> None:
    runs = [run for name in ("original", "best", "named") for run in read_runs(outcome.run(f"{name}-seed0"))]
    measures = [measure(arm, 384, None, None, runs[0].original) for arm in arms_of(runs)]
    table = loss_table(measures, 384, ())
    assert "best starts after 160 tokens of refinement" in table.about
    rows = {row[0]: row for row in table.rows}
    assert float(rows["best"][2]) == pytest.approx(runs[1].points[0].loss, abs=1e-3)
