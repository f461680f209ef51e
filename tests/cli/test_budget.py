"""A run that ends by tokens; a batch of these runs has 64 of them, and an epoch 29 batches."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from laco_train.training.budget import Limits, batches_in, run_steps
from tests.cli.runs import KEEP_ALL, Project, Run, events, scalars


@pytest.mark.parametrize(
    ("limits", "accumulate", "steps"),
    [
        (Limits(max_tokens=1), 1, 1),
        (Limits(max_tokens=64), 1, 1),
        (Limits(max_tokens=65), 1, 2),
        (Limits(max_tokens=640), 4, 3),
        (Limits(max_tokens=641), 5, 3),
        (Limits(max_tokens=10 * 64), 3, 4),  # an epoch of 10 batches ends with a step of one
        (Limits(max_tokens=11 * 64), 3, 5),
        (Limits(max_tokens=20 * 64), 3, 8),
        (Limits(max_steps=7, max_tokens=640), 1, 7),
        (Limits(max_steps=70, max_tokens=640), 1, 10),
        (Limits(max_steps=70, max_epochs=3, max_tokens=64_000), 1, 30),
        (Limits(max_steps=-1, max_epochs=-1, max_tokens=64_000), 1, 1000),
        (Limits(max_steps=-1, max_epochs=-1), 1, None),
    ],
)
def test_first_limit_wins(limits: Limits, accumulate: int, steps: int | None) -> None:
    assert run_steps(limits, batch_tokens=64, batches=10, accumulate=accumulate) == steps


@pytest.mark.parametrize("accumulate", [1, 2, 3, 4, 10, 11])
@pytest.mark.parametrize("max_tokens", [1, 64, 65, 640, 641, 1280, 1999])
def test_last_step_is_the_one_that_reaches_the_budget(accumulate: int, max_tokens: int) -> None:
    steps = run_steps(Limits(max_tokens=max_tokens), 64, 10, accumulate)
    assert steps is not None
    assert 64 * batches_in(steps - 1, 10, accumulate) < max_tokens <= 64 * batches_in(steps, 10, accumulate)


def without_end(project: Project) -> Project:
    """The project, its recipe without trainer.max_steps."""
    path = project.root / "tiny.yaml"
    recipe = yaml.safe_load(path.read_text())
    del recipe["trainer"]["max_steps"]
    path.write_text(yaml.safe_dump(recipe))
    return project


def same_run(one: Run, other: Run, step: int) -> None:
    """Assert that two runs left the same weights, optimizer, schedule, losses and export."""
    a, b = one.state(step), other.state(step)
    assert [name for name, w in a["state_dict"].items() if not torch.equal(w, b["state_dict"][name])] == []
    torch.testing.assert_close(a["optimizer_states"], b["optimizer_states"], rtol=0, atol=0)
    assert a["lr_schedulers"] == b["lr_schedulers"]
    assert one.validation() == other.validation()
    assert {p.name for p in one.folder.glob("checkpoints/*")} == {p.name for p in other.folder.glob("checkpoints/*")}
    assert {p.name for p in one.folder.glob("export/*")} == {p.name for p in other.folder.glob("export/*")}
    (ours,), (theirs,) = (run.folder.glob("export/*.safetensors") for run in (one, other))
    assert ours.read_bytes() == theirs.read_bytes()  # the plan beside it differs: it says how long the search took


def rates(folder: Path) -> list[float]:
    return [rate for _, rate in scalars(events(folder), "train/learning_rate")]


def test_run_is_that_of_the_same_number_of_steps(project: Project) -> None:
    without_end(project)
    by_steps = project.fit("--trainer.max_steps=4", *KEEP_ALL)
    by_tokens = project.fit("--budget.max_tokens=200", *KEEP_ALL)
    assert by_tokens.folder != by_steps.folder
    same_run(by_tokens, by_steps, 4)
    assert rates(by_tokens.folder) == rates(by_steps.folder)
    assert by_tokens.summary()["tokens"] == 256
    assert re.search(r"Training: 4 steps, 256 tokens, about \d+ seconds", by_tokens.result.out)


def test_resumed_run_keeps_to_the_budget(project: Project) -> None:
    budget = ["--budget.max_tokens=240", *KEEP_ALL]
    whole = without_end(project).fit(*budget)
    resumed = project.fit("--ckpt_path", str(whole.checkpoint(2)), *budget)
    expected = whole.state(4)["state_dict"]
    assert [n for n, w in resumed.state(4)["state_dict"].items() if not torch.equal(w, expected[n])] == []
    assert (resumed.summary()["steps"], resumed.validation()) == (4, whole.validation())


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (["--trainer.max_steps=2", "--budget.max_tokens=999"], 2),
        (["--trainer.max_steps=9", "--budget.max_tokens=100"], 2),
        (["--trainer.max_epochs=1", "--trainer.limit_train_batches=3", "--budget.max_tokens=999"], 3),
        (["--trainer.max_epochs=2", "--trainer.limit_train_batches=3", "--budget.max_tokens=200"], 4),
        (["--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=4", "--budget.max_tokens=200"], 2),
        (["--budget.max_tokens=1"], 1),
    ],
)
def test_limits_of_a_run(project: Project, options: list[str], steps: int) -> None:
    run = without_end(project).fit(*options, "--export.enabled=false")
    assert run.summary()["steps"] == steps
    assert run.summary()["validation"][-1]["step"] == steps


def test_budget_that_allows_no_step_is_refused(project: Project) -> None:
    result = project("fit", "--recipe", "tiny.yaml", "--budget.max_tokens=0")
    assert (result.code, result.err) == (2, "laco_train: error: budget.max_tokens: must be 1 or more, is 0\n")
