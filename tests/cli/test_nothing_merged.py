"""A search that accepts no merge: a fit ends there, with the similarity that was reached; the verb collapse says so."""

import json
from pathlib import Path

import pytest

from laco_train.collapse import CollapsePlan
from tests.cli.runs import Project
from tests.cli.test_bad_input import refused

FIT = ["fit", "--recipe", "tiny.yaml"]
NOTHING = ["--collapse.similarity_threshold", "1"]


@pytest.fixture(scope="module")
def plan(shared_project: Project) -> Path:
    """The plan of the verb collapse, which goes on."""
    result = shared_project("collapse", "--recipe", "tiny.yaml", "--output", "whole", *NOTHING)
    assert result.code == 0, result.err
    assert "Nothing was collapsed: all 6 layers stay (76,192 parameters)" in result.out
    assert "Collapsed 6 layers" not in result.out
    return shared_project.root / "whole" / "collapse_plan.json"


@pytest.mark.parametrize("strategy", ["laco", "greedy"])
def test_a_fit_is_refused_before_it_trains(shared_project: Project, plan: Path, strategy: str) -> None:
    best = max((c for c in CollapsePlan.load(plan).candidates), key=lambda c: c.similarity or -1.0)
    assert best.similarity is not None
    before = shared_project.files()
    result = shared_project(*FIT, *NOTHING, f"--collapse.strategy={strategy}")
    assert (result.code, shared_project.files()) == (2, before)
    line = result.err.splitlines()[-1]
    assert line.startswith(
        "laco_train: error: collapse.similarity_threshold: no merge is above T = 1.0, so that nothing"
    )
    assert f"similarity is {best.similarity:.4f} (layers {best.layer} to {best.layer + 1}, from 0)" in line
    assert "collapse.strategy: none trains the whole original" in line
    # what was tried is shown all the same
    assert f"merges tried, the best had similarity {best.similarity:.4f} (layer {best.layer})" in result.out
    assert "Training: " not in result.out


def test_just_below_the_similarity_that_it_names_something_merges(project: Project) -> None:
    line = project(*FIT, *NOTHING).err.splitlines()[-1]
    named = float(line.partition("the highest similarity is ")[2].split()[0])
    run = project.fit(f"--collapse.similarity_threshold={named - 1e-4}", "--trainer.max_steps=2")
    assert run.summary()["depth"] < 6


def test_a_plan_that_merges_nothing_is_refused_too(shared_project: Project, plan: Path) -> None:
    key, problem = refused(shared_project, *FIT, "--collapse.similarity_threshold=null", f"--collapse.plan={plan}")
    assert key == "collapse.plan"
    assert "merges nothing, so that the whole original would train" in problem


def test_the_whole_original_is_validated(shared_project: Project) -> None:
    result = shared_project("validate", "--recipe", "tiny.yaml", *NOTHING)
    assert result.code == 0, result.err
    assert "Nothing was collapsed: all 6 layers stay" in result.out


@pytest.mark.parametrize(
    "search",
    [
        ["--collapse.refine.tokens=64", "--collapse.refine.batch_size=2"],
        ["--collapse.strategy=greedy", "--collapse.criterion=loss"],
    ],
    ids=["laco, refined", "greedy by loss"],
)
def test_a_round_whose_depth_is_reached_already_trains_on(project: Project, search: list[str]) -> None:
    """With C = 4 a merge takes three layers away, so that a round to 5 of 6 layers leaves fewer than the next asks."""
    rounds = [{"target_depth": depth, "max_tokens": 128} for depth in (5, 4)]
    options = ["--collapse.similarity_threshold=null", "--collapse.layers_per_merge=4", "--trainer.max_steps=-1"]
    fit = [*FIT, *options, *search, f"--rounds={json.dumps(rounds)}"]
    result = project(*fit)
    assert result.code == 0, result.err
    assert "The round before left 4 layers or fewer already: this one trains on" in result.out
    folder = project.root / "lightning_logs" / "tiny" / "version_0"
    records = json.loads((folder / "rounds.json").read_text())["rounds"]
    assert [(one["source_depth"], one["depth"], one["tokens"]) for one in records] == [(6, 3, 128), (3, 3, 128)]
    assert len(CollapsePlan.load(folder / "export" / "collapse_plan.json").lineage) == 3
    card = (folder / "export" / "README.md").read_text(encoding="utf-8")
    assert ("was fitted to the original on 64 tokens." in card) == ("refine" in search[0])
    assert project(*fit, "--resume=auto").out.endswith("is finished: there is nothing to resume.\n")
