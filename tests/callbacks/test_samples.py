"""What the models of a run write, kept through a stop and beside tasks and the export."""

import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks.soak import content
from laco_train.collapse import CollapsePlan, apply_plan
from laco_train.evaluation.samples import PROMPTS, continuations
from tests.cli.runs import Project, Run
from tests.cli.test_resume_auto import broken_off, resume

SAMPLES = ["--evaluation.samples=true"]
LORA = ["--model.method=lora", "--model.lora.rank=4", "--model.lora.dropout=0.5"]


@pytest.fixture(scope="module")
def sampled(shared_project: Project) -> Run:
    """A run that kept samples."""
    return shared_project.fit(*SAMPLES)


def written(run: Run) -> dict[str, list[str]]:
    values: dict[str, list[str]] = run.summary()["samples"]
    return values


def test_each_model_writes_after_the_same_prompts(
    sampled: Run, shared_project: Project, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    def load(folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder)

    original = load(shared_project.root / "model")
    plan = CollapsePlan.load(sampled.folder / "collapse_plan.json")
    collapsed = apply_plan(load(shared_project.root / "model"), plan)
    models = {"original": original, "collapsed": collapsed, "trained": load(sampled.folder / "export")}
    expected = {name: continuations(model, tiny_tokenizer, PROMPTS) for name, model in models.items()}
    assert written(sampled) == {"prompts": list(PROMPTS), **expected}
    assert len({tuple(texts) for texts in expected.values()}) == 3


def test_no_step_is_another_for_it(sampled: Run, project: Project) -> None:
    plain = project.fit()
    assert plain.validation() == sampled.validation()
    assert written(plain) == {"prompts": []}


def test_resumed_run_keeps_what_the_original_wrote(project: Project, sampled: Run) -> None:
    cut = broken_off(project, 3, *SAMPLES)
    result = resume(project, *SAMPLES)
    assert result.code == 0, result.err
    assert "Samples of the original model" not in result.out
    assert content(cut / "summary.json") == content(sampled.folder / "summary.json")


def test_adapters_write_too(project: Project, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    (project.root / "prompts.txt").write_text("The river\nIt is a truth\n")
    run = project.fit(*SAMPLES, "--evaluation.prompts=prompts.txt", *LORA)
    exported = AutoModelForCausalLM.from_pretrained(run.folder / "export")
    assert written(run)["prompts"] == ["The river", "It is a truth"]
    assert written(run)["trained"] == continuations(exported, tiny_tokenizer, written(run)["prompts"])
    assert written(run)["trained"] != written(run)["collapsed"]


def test_tasks_need_the_harness(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    result = project("fit", "--recipe", "tiny.yaml", "--evaluation.tasks=[piqa]")
    assert result.code == 2 and result.err.endswith("which is the extra evaluation\n")
    assert result.err.splitlines()[-1].startswith("laco_train: error: evaluation.tasks: needs lm-evaluation-harness")


def test_prompts_that_are_not_there(project: Project) -> None:
    before = project.files()
    for options, problem in (
        ([*SAMPLES, "--evaluation.prompts=none.txt"], "evaluation.prompts: none.txt can't be read"),
        (["--evaluation.prompts=prompts.txt"], "evaluation.prompts: is set, but evaluation.samples is false"),
    ):
        result = project("fit", "--recipe", "tiny.yaml", *options)
        assert result.code == 2 and problem in result.err
    assert project.files() == before
