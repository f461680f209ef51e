"""The verb that collapses and writes, without training."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from laco_train.collapse import CollapsePlan, apply_plan
from laco_train.settings import SECTIONS
from tests.cli.runs import Project


def collapse(project: Project, *options: str) -> Path:
    result = project("collapse", "--recipe", "tiny.yaml", "--output", "collapsed", *options)
    assert result.code == 0, result.err
    assert "collapsed is complete" in result.out
    return project.root / "collapsed"


def test_writes_the_collapsed_model_and_nothing_else(project: Project) -> None:
    before = set(project.files())
    folder = collapse(project)
    assert {name.partition("/")[0] for name in set(project.files()) - before} == {"collapsed"}
    plan = CollapsePlan.load(folder / "collapse_plan.json")
    assert (plan.source, plan.source_depth, plan.depth, len(plan.merges)) == ("model", 6, 4, 2)
    expected = apply_plan(AutoModelForCausalLM.from_pretrained(project.root / "model"), plan).state_dict()
    written = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert expected.keys() == written.keys()
    assert [name for name in expected if not torch.equal(expected[name], written[name])] == []
    prompt = AutoTokenizer.from_pretrained(folder)("The river", return_tensors="pt").input_ids
    assert AutoModelForCausalLM.from_pretrained(folder).generate(prompt, max_new_tokens=4).shape[1] > prompt.shape[1]


def test_a_recipe_with_every_section_of_fit_will_do(project: Project) -> None:
    printed = yaml.safe_load(project("fit", "--recipe", "tiny.yaml", "--print_config").out)
    whole = {name: printed[name] for name in ("seed_everything", *SECTIONS, "rounds", "trainer")}
    (project.root / "tiny.yaml").write_text(yaml.safe_dump(whole))
    collapse(project)
    result = project("analyze", "--recipe", "tiny.yaml", "--output", "analysis", "--print_config")
    assert result.code == 0, result.err


def test_model_card_names_source_plan_and_no_training(project: Project) -> None:
    card = (collapse(project) / "README.md").read_text()
    assert "A model collapsed from 6 to 4 decoder layers" in card
    assert "`model`" in card
    assert "`tiny`" in card
    assert "without training since" in card


def test_a_lora_recipe_collapses_too(project: Project) -> None:
    assert (collapse(project, "--model.method", "lora") / "model.safetensors").is_file()


def test_weights_take_the_type_of_the_recipe(project: Project) -> None:
    folder = collapse(project, "--model.dtype", "bfloat16", "--export.dtype", "float16")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"
    assert CollapsePlan.load(folder / "collapse_plan.json").dtype == "bfloat16"


def test_plan_of_the_verb_gives_the_same_model(project: Project) -> None:
    first = collapse(project)
    plan = str(first / "collapse_plan.json")
    result = project("collapse", "--recipe=tiny.yaml", "--output=again", "--collapse.plan", plan)
    assert result.code == 0, result.err
    assert (project.root / "again" / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ("--rounds=[{target_depth: 4}]", "rounds: make several models"),
        ("--model.from_scratch=true", "model.from_scratch: is for fit"),
        ("--trainer=[1]", "trainer"),
    ],
)
def test_what_collapse_would_leave_out_is_refused(project: Project, option: str, problem: str) -> None:
    result = project("collapse", "--recipe", "tiny.yaml", "--output", "none", option)
    assert result.code == 2
    assert problem in result.err and "Traceback" not in result.err
    assert not (project.root / "none").exists()
