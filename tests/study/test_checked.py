"""A study is checked whole before its first run: types of all values, depths, sweeps, and where it goes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from laco_train.errors import TrainingStopped
from laco_train.study.journal import STUDY_FILE
from tests.cli.runs import Project
from tests.study.studies import ready, study_of, write_recipe
from tests.study.test_ratios import BELOW
from tests.study.test_run import refuse, refused


def arm(**sections: Any) -> dict[str, Any]:
    return {"study": {"arms": {"laco": sections}}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (arm(collapse=None), "study.arms.laco.collapse: is a section, but is None; write its keys, or leave it out"),
        (arm(collapse=3), "study.arms.laco.collapse: is a section, but is 3"),
        (arm(collapse=[1]), "study.arms.laco.collapse: is a section, but is [1]"),
        (arm(speed=None), "study.arms.laco.speed: is a section, but is None"),
        (arm(model={"optimizer": 3}), "study.arms.laco: model.optimizer: is a section, but is 3"),
        (arm(model={"optimizer": None}), "study.arms.laco: model.optimizer: is a section, but is None"),
        (arm(collapse={"layers_per_merge": None}), "study.arms.laco: collapse.layers_per_merge: is null"),
        ({"study": {"arms": {1: {"collapse": {"strategy": "tail"}}}}}, "study.arms: 1 is no name for a folder"),
        ({"trainer": {"default_root_dir": 3}}, "trainer.default_root_dir: "),
        ({"trainer": {"default_root_dir": "train.jsonl"}}, "trainer.default_root_dir: "),
        ({"trainer": {"accumulate_grad_batches": "two"}}, "trainer.accumulate_grad_batches: must be int, is two"),
        ({"collapse": {"target_depth": 6}}, "study.arms.laco: collapse.target_depth: is 6, but the model has only 6"),
        (arm(model={"method": "last_layers", "last_layers": 5}), "study.arms.laco: model.last_layers: is 5, but the"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(shared_project: Project, changes: dict[str, Any], said: str) -> None:
    write_recipe(shared_project, changes)
    assert refused(shared_project).startswith(said)


@pytest.mark.parametrize("refine", [3, None, {"tokens": "x"}])
def test_refinement_of_another_type_is_one_line_where_nothing_trains(shared_project: Project, refine: Any) -> None:
    """There its tokens are reckoned with before fit would read them."""
    arms = {"laco": {"collapse": {"refine": refine}}}
    write_recipe(shared_project, below={**BELOW, "study": {**BELOW["study"], "arms": arms}})
    assert refused(shared_project).startswith("study.arms.laco: collapse.refine")


def test_a_section_without_keys_changes_nothing(shared_project: Project) -> None:
    write_recipe(shared_project, arm(collapse={}, model={"optimizer": {}}))
    ready(shared_project)


def test_a_sweep_under_another_recipe_is_told_before_any_arm_runs(project: Project) -> None:
    rates = {"learning_rates": [0.001, 0.01], "sweep_share": 0.5, "sweep_fraction": 0.3, "seeds": [0]}
    write_recipe(project, {"study": {**rates, "arms": {"scratch": {}}}, "export": {"enabled": False}})
    outcome = study_of(project, "--arms", "laco")
    shutil.rmtree(outcome.study.folder / "laco-seed0")
    assert json.loads((outcome.study.logs / "s-sweep/laco-0.01/version_0/summary.json").read_text())["steps"] == 3
    line = refused(project, "--study.arms", "{original: {}, laco: {speed: {checkpointing: all}}}")
    assert line.startswith("speed.checkpointing: was auto when ") and "s-sweep/laco-0.001 began" in line


def test_the_reason_of_a_failure_is_that_of_the_last_try(project: Project) -> None:
    write_recipe(
        project, {"study": {"seeds": [0], "arms": {"laco": {"model": {"optimizer": {"learning_rate": 1e30}}}}}}
    )
    with pytest.raises(TrainingStopped):
        study_of(project, "--arms", "laco")
    assert "at step" in problem(project)

    def killed(arguments: list[str], log: Path) -> int:
        with log.open("a") as output:
            output.write("Killed\n")
        return 137

    with pytest.raises(TrainingStopped):
        study_of(project, "--arms", "laco", fit=killed)
    assert problem(project) == "Killed (exit code 137)"
    with pytest.raises(TrainingStopped):
        study_of(project, "--arms", "laco", fit=lambda arguments, log: 139)
    assert problem(project) == "it said nothing (exit code 139)"


def problem(project: Project) -> str:
    """Why laco failed, by the journal."""
    entries = json.loads((project.root / "lightning_logs/s" / STUDY_FILE).read_text())["runs"]
    (found,) = [str(entry["problem"]) for entry in entries if entry["arm"] == "laco"]
    return found


def test_a_tilde_is_the_users_folder(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write_recipe(project, {"study": {"seeds": [0]}, "trainer": {"default_root_dir": "~/runs"}})
    outcome = study_of(project, "--arms", "laco")
    assert outcome.study.folder == tmp_path / "home/runs/lightning_logs/s"
    assert (outcome.run("laco-seed0") / "summary.json").is_file()
    assert study_of(project, "--arms", "laco", fit=refuse).lines == ["laco-seed0: finished before, skipped"]
    assert not (project.root / "~").exists()
