"""Refinement in whole runs: before training, in the verb collapse, on a run that goes on, and in several rounds."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from laco_train.collapse import CollapsePlan, apply_plan
from tests.cli.runs import KEEP_ALL, Project, Run

REFINE = ["--collapse.refine.tokens=2560", "--collapse.refine.batch_size=2", "--collapse.refine.learning_rate=3e-3"]


@pytest.fixture(scope="module")
def refined(shared_project: Project, run: Run) -> Run:
    """After `run`, which is the same without."""
    return shared_project.fit(*KEEP_ALL, *REFINE)


def distance(project: Project, run: Run) -> float:
    """Mean divergence of what training began with from the original, over some token sequences."""
    source = project.root / "model"
    original, begun = (AutoModelForCausalLM.from_pretrained(source) for _ in range(2))
    apply_plan(begun, CollapsePlan.load(run.folder / "collapse_plan.json"))
    ids = torch.randint(5, 300, (16, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        p, q = (model(ids).logits.log_softmax(-1) for model in (original, begun))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_the_run_begins_nearer_to_the_original(shared_project: Project, refined: Run, run: Run) -> None:
    assert distance(shared_project, refined) < 0.8 * distance(shared_project, run)
    assert refined.summary()["losses"]["original"] == run.summary()["losses"]["original"]
    assert "Refining: 2,560 tokens" in refined.result.out


def test_plan_and_file_give_what_training_began_with(shared_project: Project, refined: Run) -> None:
    plan = CollapsePlan.load(refined.folder / "collapse_plan.json")
    assert plan.refined is not None and plan.refined.tokens == 2560
    model = apply_plan(AutoModelForCausalLM.from_pretrained(shared_project.root / "model"), plan)
    again = shared_project.fit("--collapse.plan", str(refined.folder / "collapse_plan.json"), "--trainer.max_steps=1")
    assert again.validation()[0] == refined.validation()[0]
    assert model.config.num_hidden_layers == plan.depth


def test_goes_on_without_another_refinement(shared_project: Project, refined: Run) -> None:
    resumed = shared_project.fit(*REFINE, "--ckpt_path", str(refined.checkpoint(2)))
    assert "Refining" not in resumed.result.out
    ours, theirs = (one.state(6)["state_dict"] for one in (resumed, refined))
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_its_tokens_come_off_the_budget(shared_project: Project) -> None:
    """2,560 of 3,200 tokens, at 64 a step: ten steps are left, and half of all tokens lies before them."""
    options = ["--trainer.max_steps=-1", "--budget.max_tokens=3200", "--budget.evaluate_at=[0.5,0.9]"]
    run = shared_project.fit(*REFINE, *options, "--trainer.val_check_interval=10")
    points = [(point["step"], point["tokens"]) for point in run.summary()["validation"]]
    assert points == [(0, 2560), (5, 2880), (10, 3200)]
    seconds = [point["seconds"] for point in run.summary()["validation"]]
    assert 0 < seconds[0] < seconds[1]


def test_a_refinement_that_leaves_nothing_to_train_is_refused(project: Project) -> None:
    result = project("fit", "--recipe", "tiny.yaml", *REFINE, "--budget.max_tokens=2560")
    assert result.code == 2 and "collapse.refine.tokens" in result.err.strip().splitlines()[-1]


def test_the_verb_collapse_refines_too(project: Project) -> None:
    result = project("collapse", "--recipe", "tiny.yaml", "--output", "collapsed", *REFINE)
    assert result.code == 0, result.err
    assert "fitted on 2,560 tokens" in result.out
    record = json.loads((project.root / "collapsed" / "collapse_plan.json").read_text())["refined"]
    assert record["tokens"] == 2560
    plain = project("collapse", "--recipe", "tiny.yaml", "--output", "plain")
    assert plain.code == 0, plain.err
    one, other = (AutoModelForCausalLM.from_pretrained(project.root / name) for name in ("collapsed", "plain"))
    assert not torch.equal(one.model.layers[0].mlp.up_proj.weight, other.model.layers[0].mlp.up_proj.weight)


def test_each_round_refines_what_it_collapsed(project: Project) -> None:
    rounds = [{"target_depth": 5, "max_tokens": 2688}, {"target_depth": 4, "max_tokens": 2688}]
    options = ["--collapse.similarity_threshold=null", f"--rounds={json.dumps(rounds)}", "--trainer.max_steps=-1"]
    run = project.fit(*REFINE, *options)
    assert run.result.out.count("Refining: 2,560 tokens") == 2


@pytest.mark.parametrize(
    ("option", "key"),
    [
        ("--collapse.refine.tokens=-1", "collapse.refine.tokens"),
        ("--collapse.refine.tokens=63", "collapse.refine.tokens"),
        ("--collapse.refine.windows=1.5", "collapse.refine.windows"),
        ("--collapse.refine.batch_size=0", "collapse.refine.batch_size"),
        ("--collapse.refine.learning_rate=0", "collapse.refine.learning_rate"),
        ("--collapse.refine.seconds=0", "collapse.refine.seconds"),
    ],
)
def test_bad_settings_are_one_line(project: Project, option: str, key: str) -> None:
    before = project.files()
    result = project("fit", "--recipe", "tiny.yaml", *REFINE, option)
    assert result.code == 2
    (line,) = result.err.strip().splitlines()[-1:]
    assert line.startswith(f"laco_train: error: {key}")
    assert project.files() == before
