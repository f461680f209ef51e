"""Refinement in whole runs: before training, in the verb collapse, on a run that goes on, and in several rounds."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from laco_train.collapse import CollapsePlan, apply_plan
from tests.cli.runs import KEEP_ALL, Project, Run, events, scalars

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
    card = (run.folder / "export" / "README.md").read_text(encoding="utf-8")
    assert "640 tokens in 10 optimizer steps" in card  # those of refinement were no steps
    assert run.summary()["refined_tokens"] == 2560


def points_of(run: Run) -> list[tuple[int, int]]:
    """(optimizer step, tokens) of each validation."""
    return [(point["step"], point["tokens"]) for point in run.summary()["validation"]]


BUDGET = ["--trainer.max_steps=-1", "--budget.max_tokens=384", "--export.enabled=false"]
SHORT = ["--collapse.refine.tokens=128", "--collapse.refine.batch_size=2"]


def test_a_plan_that_is_refined_pays_for_it_too(project: Project) -> None:
    """The settings in the plan, which were those of its search, ask for none."""
    plan = str(project.fit("--trainer.max_steps=1", "--export.enabled=false").folder / "collapse_plan.json")
    searched, given = (project.fit(*SHORT, *BUDGET, *options) for options in ([], ["--collapse.plan", plan]))
    assert points_of(given) == points_of(searched) == [(0, 128), (2, 256), (4, 384)]
    for run in (searched, given):
        assert CollapsePlan.load(run.folder / "collapse_plan.json").refinement.tokens == 128


def test_what_streamline_fits_its_layer_to_is_on_top_of_the_budget(project: Project) -> None:
    streamline = ["--collapse.strategy=streamline", "--collapse.target_depth=4", "--collapse.similarity_threshold=null"]
    run = project.fit(*SHORT, *BUDGET, *streamline)
    assert points_of(run) == [(0, 128), (2, 256), (4, 384)]
    plan = CollapsePlan.load(run.folder / "collapse_plan.json")
    assert plan.refined is not None and plan.refined.tokens > 384
    assert f"fitted on {plan.refined.tokens - 128:,} tokens" in run.result.out  # told before it is refined


def test_validate_refines_too(shared_project: Project, refined: Run) -> None:
    before = set(shared_project.root.glob("lightning_logs/tiny/*"))
    result = shared_project("validate", "--recipe", "tiny.yaml", *REFINE)
    assert result.code == 0, result.err
    assert "Refining: 2,560 tokens" in result.out
    (folder,) = set(shared_project.root.glob("lightning_logs/tiny/*")) - before
    ((_, loss),) = scalars(events(folder), "val/loss")
    assert loss == pytest.approx(refined.validation()[0], rel=1e-6)


@pytest.mark.parametrize("verb", [["fit"], ["collapse", "--output", "collapsed"]], ids=lambda verb: verb[0])
def test_fewer_blocks_than_a_batch_are_one_line(project: Project, verb: list[str]) -> None:
    options = ["--collapse.refine.tokens=100000", "--collapse.refine.batch_size=1000"]
    result = project(*verb, "--recipe", "tiny.yaml", *options)
    assert result.code == 2
    line = result.err.strip().splitlines()[-1]
    assert re.match(r"laco_train: error: collapse\.refine\.batch_size: is 1000, but .* only \d+ blocks of 32", line)


@pytest.mark.parametrize("verb", [["fit"], ["collapse", "--output", "collapsed"]], ids=lambda verb: verb[0])
def test_blocks_longer_than_the_models_positions_are_one_line(project: Project, verb: list[str]) -> None:
    before = project.files()
    result = project(*verb, "--recipe", "tiny.yaml", *REFINE, "--data.block_size=512")
    assert result.code == 2
    line = result.err.strip().splitlines()[-1]
    assert line.startswith("laco_train: error: data.block_size: is 512, more than the model's 256 positions")
    assert project.files() == before


def test_blocks_that_the_verb_collapse_does_not_read_may_be_of_any_length(project: Project) -> None:
    result = project("collapse", "--recipe", "tiny.yaml", "--output", "collapsed", "--data.block_size=512")
    assert result.code == 0, result.err


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
    card = (run.folder / "export" / "README.md").read_text(encoding="utf-8")
    assert "256 tokens in 4 optimizer steps" in card  # two of 64 tokens a round


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
