"""Accuracies in the middle of a run; a step of these runs has 64 tokens."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.soak import content, curves
from tests.cli.runs import Project, Run, events, scalars
from tests.cli.test_resume_auto import broken_off, resume
from tests.evaluation.conftest import mini_suite

__all__ = ["mini_suite"]

pytest.importorskip("lm_eval", reason="the extra evaluation")

STEPS = [0, 3, 6]
DROPOUT = "--model.method=lora", "--model.lora.dropout=0.3"


def asked(suite: Path, *tasks: str) -> list[str]:
    """Options of an evaluation before training, after the half and at the end."""
    named = ",".join(tasks or ("piqa", "boolq"))
    return [f"--evaluation.tasks=[{named}]", "--evaluation.at=[0,0.5,1]", f"--evaluation.suite={suite}"]


@pytest.fixture(scope="module")
def evaluated(shared_project: Project, mini_suite: Path) -> Run:
    """An unbroken run with dropout, so that a random number too many would show."""
    return shared_project.fit(*DROPOUT, *asked(mini_suite))


def found(run: Run) -> list[dict[str, Any]]:
    values: list[dict[str, Any]] = run.summary()["evaluation"]
    return values


def test_each_point_once_in_summary_and_curves(evaluated: Run) -> None:
    assert [(p["step"], p["tokens"], p["task"]) for p in found(evaluated)] == [
        (step, 64 * step, task) for step in STEPS for task in ("piqa", "boolq")
    ]
    seen = events(evaluated.folder)
    for task in ("piqa", "boolq"):
        values = [p["value"] for p in found(evaluated) if p["task"] == task]
        assert scalars(seen, f"accuracy/{task}") == [(s, pytest.approx(v)) for s, v in zip(STEPS, values, strict=True)]
        by_tokens = scalars(seen, f"by_tokens/accuracy/{task}")
        assert by_tokens == [(64 * s, pytest.approx(v)) for s, v in zip(STEPS, values, strict=True)]
    assert "Accuracy after 192 tokens: piqa" in evaluated.result.out
    assert "loglikelihood" not in evaluated.result.err  # the bars of the harness would fill a log


def test_no_step_is_another_for_it(evaluated: Run, project: Project) -> None:
    plain = project.fit(*DROPOUT)
    assert plain.validation() == evaluated.validation()
    train = [scalars(events(run.folder), "train/loss") for run in (plain, evaluated)]
    assert train[0] == train[1] and len(train[0]) == 6
    assert found(plain) == []


def test_it_is_what_the_verb_says_of_the_export(evaluated: Run, shared_project: Project, mini_suite: Path) -> None:
    options = ["--tasks", "piqa,boolq", "--suite", str(mini_suite), "--samples", "false", "--output", "apart"]
    result = shared_project("evaluate", "--model", str(evaluated.folder / "export"), *options)
    assert result.code == 0, result.err
    (model,) = json.loads((shared_project.root / "apart/evaluation.json").read_text())["models"]
    for point in found(evaluated)[-2:]:
        task = model["tasks"][point["task"]]
        assert [point[name] for name in ("value", "error", "questions", "questions_sha256", "chance", "data")] == [
            task[name] for name in ("accuracy", "error", "questions", "questions_sha256", "chance", "data")
        ]


def test_a_checkpoint_tells_the_model_card_what_the_run_does(evaluated: Run, shared_project: Project) -> None:
    command = ["export", "--checkpoint", str(evaluated.checkpoint()), "--output", "from_checkpoint"]
    result = shared_project(*command)
    assert result.code == 0, result.err
    cards = [folder / "README.md" for folder in (evaluated.folder / "export", shared_project.root / "from_checkpoint")]
    assert "| boolq | acc |" in cards[0].read_text(encoding="utf-8")
    assert cards[0].read_text(encoding="utf-8") == cards[1].read_text(encoding="utf-8")


@pytest.mark.parametrize("step", [3, 5])  # at the point at 3, where no checkpoint is, and one checkpoint after it
def test_resumed_run_has_each_point_once(project: Project, evaluated: Run, mini_suite: Path, step: int) -> None:
    options = [*DROPOUT, *asked(mini_suite)]
    cut = broken_off(project, step, *options)
    result = resume(project, *options)
    assert result.code == 0, result.err
    assert content(cut / "summary.json") == content(evaluated.folder / "summary.json")
    assert curves(cut) == curves(evaluated.folder)


def test_a_limit_is_kept_by_every_point(project: Project, mini_suite: Path) -> None:
    run = project.fit(*asked(mini_suite, "mmlu"), "--evaluation.limit=3", "--export.enabled=false")
    assert [p["questions"] for p in found(run)] == [3, 3, 3]
    assert len({p["questions_sha256"] for p in found(run)}) == 1


def test_gathered_gradients(project: Project, mini_suite: Path) -> None:
    options = [*asked(mini_suite, "piqa"), "--trainer.max_steps=4", "--trainer.accumulate_grad_batches=2"]
    run = project.fit(*options, "--trainer.val_check_interval=100", "--export.enabled=false")
    assert [(p["step"], p["tokens"]) for p in found(run)] == [(0, 0), (2, 256), (4, 512)]


def test_bad_input_writes_nothing(project: Project, mini_suite: Path) -> None:
    before = project.files()
    for options, problem in (
        (asked(mini_suite, "piqua"), "evaluation.tasks: the harness has no task 'piqua'"),
        ([*asked(mini_suite), "--evaluation.at=[1.5]"], "evaluation.at: must be shares from 0 to 1"),
        ([*asked(mini_suite), "--evaluation.at=[]"], "evaluation.at: is empty"),
        ([*asked(mini_suite), "--evaluation.limit=0"], "evaluation.limit: must be 1 or more"),
        (asked(mini_suite / "none"), "evaluation.suite: "),
        (asked(mini_suite, "piqa", "piqa"), "evaluation.tasks: names piqa twice"),
    ):
        result = project("fit", "--recipe", "tiny.yaml", *options)
        assert (result.code, result.err.count("\n")) == (2, 1), result.err
        assert problem in result.err
    assert project.files() == before
