"""Options of `study` beside its recipe: single keys of arms, and its name."""

from typing import Any

import pytest
import yaml

from tests.cli.runs import Project
from tests.study.studies import ready, write_recipe

LACO = {"collapse": {"layers_per_merge": 3}, "model": {"method": "lora", "lora": {"rank": 2}}}


@pytest.fixture
def arms(shared_project: Project) -> dict[str, Any]:
    """Of the recipe."""
    write_recipe(shared_project, {"study": {"arms": {"laco": LACO}}})
    return {"original": {}, "laco": LACO, "scratch": {}}


def test_single_keys_of_arms_go_over_the_recipes(shared_project: Project, arms: dict[str, Any]) -> None:
    options = ["--study.arms.laco.collapse.merge_rule=mean", "--study.arms.laco.model.lora.rank", "4"]
    options += ["--study.arms.laco.model.optimizer.learning_rate=1e-4", "--study.arms.mine.collapse.strategy=tail"]
    outcome, _ = ready(shared_project, *options)
    arms["laco"] = {
        "collapse": {"layers_per_merge": 3, "merge_rule": "mean"},
        "model": {"method": "lora", "lora": {"rank": 4}, "optimizer": {"learning_rate": 1e-4}},
    }
    assert outcome.study.settings.arms == {**arms, "mine": {"collapse": {"strategy": "tail"}}}
    printed = shared_project("study", "--recipe", "s.yaml", *options, "--print_config")
    assert yaml.safe_load(printed.out)["study"]["arms"]["laco"]["collapse"] == arms["laco"]["collapse"]


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("laco.collapse.merge_rle=mean", "study.arms.laco: collapse.merge_rle: is unknown here"),
        ("laco.data.seed=1", "study.arms.laco.data: can't differ: arms change only model, collapse, speed"),
        ("lacco.collapse.merge_rule=mean", "study.arms: there is no arm 'lacco'"),
        ("laco.collapse.merge_rule", "--study.arms.laco.collapse.merge_rule: names no value"),
    ],
)
def test_bad_keys_of_arms(shared_project: Project, arms: dict[str, Any], option: str, said: str) -> None:
    result = shared_project("study", "--recipe", "s.yaml", f"--study.arms.{option}")
    assert result.code == 2
    assert result.err.splitlines()[-1].startswith(f"laco_train: error: {said}")


def test_a_study_may_have_a_name_of_its_own(shared_project: Project, arms: dict[str, Any]) -> None:
    outcome, _ = ready(shared_project, "--name", "other")
    assert outcome.study.folder == shared_project.root / "lightning_logs" / "other"
    assert "name" not in outcome.study.shared
