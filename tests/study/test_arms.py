"""From a study's recipe to those of its arms."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from laco_train.checks import check_collapse, check_model
from laco_train.errors import InputError
from laco_train.settings import CollapseSettings, ModelSettings, RefineSettings
from laco_train.study.arms import arm_recipe, leaves, merged
from laco_train.study.read import read_runs
from laco_train.study.settings import ARMS, RIVALS, StudySettings, check_arms
from laco_train.study.tasks import run_name
from tests.study.fake_runs import summary, write_run

SHARED: dict[str, Any] = {
    "model": asdict(ModelSettings("model")),
    "collapse": asdict(CollapseSettings(target_depth=4, layers_per_merge=3)),
    "data": {"seed": 9, "train": "t.jsonl", "sweep_fraction": 0.0},
    "budget": {"max_tokens": 1000, "evaluate_at": [0.5]},
    "trainer": {"devices": 1},
    "export": {"enabled": True},
}


def recipe(arm: str, study: StudySettings | None = None, rate: float | None = None) -> dict[str, Any]:
    return arm_recipe(SHARED, study or StudySettings(), arm, seed=3, rate=rate)


def read(made: dict[str, Any]) -> CollapseSettings:
    values = dict(made["collapse"])
    return CollapseSettings(**{**values, "refine": RefineSettings(**values["refine"])})


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_a_valid_recipe_of_the_same_depth(arm: str) -> None:
    made = recipe(arm)
    collapse = read(made)
    check_collapse(collapse, depth=6)
    assert collapse.strategy == {"original": "none", "scratch": "laco"}.get(arm, arm)
    assert collapse.target_depth == (None if arm == "original" else 4)
    assert made["model"]["from_scratch"] == (arm == "scratch")
    check_model(ModelSettings("model", from_scratch=made["model"]["from_scratch"]))


def test_a_merge_of_several_layers_may_not_overshoot() -> None:
    assert [arm for arm in ARMS if recipe(arm)["collapse"]["exact"]] == ["laco", "greedy", "scratch"]


@pytest.mark.parametrize("arm", ["original", "laco", *RIVALS, "scratch"])
def test_arms_differ_in_collapse_and_from_scratch_alone(arm: str) -> None:
    one, other = leaves(recipe(arm)), leaves(recipe("tail"))
    different = {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}
    assert {key.partition(".")[0] for key in different - {"model.from_scratch"}} <= {"collapse"}
    assert (one["data.seed"], one["seed_everything"]) == (3, 3)


def test_changes_of_an_arm_win_and_scratch_takes_over_the_collapse_of_laco() -> None:
    own = {"collapse": {"merge_rule": "mean"}, "model": {"optimizer": {"learning_rate": 0.5}}}
    study = StudySettings(arms={"laco": own, "scratch": None, "tail": {}})
    assert recipe("laco", study)["collapse"]["merge_rule"] == "mean"
    assert recipe("scratch", study)["collapse"] == recipe("laco", study)["collapse"]
    rates = [recipe(arm, study)["model"]["optimizer"]["learning_rate"] for arm in study.arms]
    assert rates == [0.5, 3e-4, 3e-4]
    assert recipe("tail", study, rate=0.1)["model"]["optimizer"]["learning_rate"] == 0.1


def test_all_runs_leave_out_what_a_sweep_is_validated_on() -> None:
    study = StudySettings(learning_rates=[0.1, 0.2], sweep_fraction=0.25)
    assert recipe("laco", study)["data"]["sweep_fraction"] == 0.25
    assert recipe("laco")["data"]["sweep_fraction"] == 0.0


@pytest.mark.parametrize(
    ("trainer", "names"),
    [
        ({}, ["BestAndNewestCheckpoint"]),
        ({"callbacks": [{"class_path": "m.Mine"}]}, ["Mine", "BestAndNewestCheckpoint"]),
        ({"callbacks": [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}]}, ["ModelCheckpoint"]),
        ({"enable_checkpointing": False}, None),
    ],
)
def test_best_and_last_checkpoint_unless_told_otherwise(trainer: dict[str, Any], names: list[str] | None) -> None:
    made = arm_recipe(merged(SHARED, {"trainer": trainer}), StudySettings(), "laco", 0, None)["trainer"]["callbacks"]
    found = None if made is None else [one["class_path"].rpartition(".")[2] for one in made]
    assert found == names


def test_shared_recipe_stays_as_it_is() -> None:
    before = yaml.safe_dump(SHARED)
    recipe("scratch")
    assert yaml.safe_dump(SHARED) == before


@pytest.mark.parametrize(
    ("collapse", "depth"),
    [({"strategy": "tail", "refine": {"tokens": 64}}, 4), ({"remove": [1, 2]}, None)],
    ids=["strategy", "layers"],
)
def test_an_arm_of_any_name_that_says_how_its_layers_are_chosen(collapse: dict[str, Any], depth: int | None) -> None:
    study = StudySettings(arms={"original": {}, "mine": {"collapse": collapse}})
    check_arms(study)
    found = read(recipe("mine", study))
    check_collapse(found, depth=6)
    assert (found.target_depth, found.remove, found.refine.tokens) == (
        depth,
        collapse.get("remove"),
        collapse.get("refine", {}).get("tokens", 0),
    )


@pytest.mark.parametrize("name", ["mine", "a/b", ".."])
def test_names_that_say_nothing_or_are_no_folders_are_refused(name: str) -> None:
    collapse = {} if name == "mine" else {"strategy": "tail"}
    with pytest.raises(InputError, match=r"study\.arms"):
        check_arms(StudySettings(arms={name: {"collapse": collapse}}))


@pytest.mark.parametrize("name", ["lora-r16", "lora-r2.5"])
def test_a_name_that_reads_as_a_ratio_is_refused(name: str) -> None:
    """Its run would be reported as that of the arm lora with 16% removed."""
    with pytest.raises(InputError, match=rf"^study\.arms: {name!r} ends as the folder of a ratio") as error:
        check_arms(StudySettings(arms={name: {"collapse": {"strategy": "tail"}}}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["lora_r16", "lora-r16-wide", "lora-rank16", "r16"])
def test_a_name_that_only_looks_like_a_ratio_is_taken(tmp_path: Path, name: str) -> None:
    check_arms(StudySettings(arms={name: {"collapse": {"strategy": "tail"}}}))
    (run,) = read_runs(write_run(tmp_path / run_name(name, 0, None) / "version_0", summary([(0, 6.0), (10, 3.0)])))
    assert (run.name, run.ratio) == (name, None)


def test_the_original_is_never_refined() -> None:
    shared = merged(SHARED, {"collapse": {"refine": {"tokens": 64}}})
    assert arm_recipe(shared, StudySettings(), "original", 0, None)["collapse"]["refine"]["tokens"] == 0
    assert arm_recipe(shared, StudySettings(), "tail", 0, None)["collapse"]["refine"]["tokens"] == 64


def test_an_untrained_arm_may_be_refined() -> None:
    shared = merged(SHARED, {"collapse": {"refine": {"tokens": 64}}, "budget": {"max_tokens": 0}})
    made = arm_recipe(shared, StudySettings(), "tail", 0, None)
    assert made["budget"]["max_tokens"] > 64
