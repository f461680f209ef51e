"""Validation at chosen shares of a run's tokens; a step of these runs has 64 of them."""

import shutil
from typing import Any

import pytest

from benchmarks.soak import content, curves
from laco_train.training.budget import steps_at
from tests.cli.runs import Project, Run, events, scalars
from tests.cli.test_resume_auto import broken_off, resume

OPTIONS = ["--budget.evaluate_at=[0.1,0.5,0.7,1.0]", "--trainer.max_steps=10", "--trainer.val_check_interval=5"]
STEPS = [0, 1, 5, 7, 10]
"""0.5 and 1.0 are Lightning's too."""


@pytest.mark.parametrize(
    ("shares", "steps", "expected"),
    [
        ([0.01, 0.5, 1.0], 10, {1, 5, 10}),
        ([0.07, 0.29], 100, {7, 29}),
        ([0.05, 0.1], 7, {1}),
        ([0.01, 0.05], 320, {3, 16}),
        ([], 5, set()),
    ],
)
def test_step_nearest_to_a_share(shares: list[float], steps: int, expected: set[int]) -> None:
    assert steps_at(shares, steps) == expected


def test_shares_count_what_went_before() -> None:
    """Of 10 steps' worth of tokens, 2 went to a refinement: half of all is 3 steps on."""
    assert steps_at([0.1, 0.5, 1.0], 8, 2.0) == {3, 8}


@pytest.fixture(scope="module")
def evaluated(shared_project: Project) -> Run:
    """An unbroken run."""
    return shared_project.fit(*OPTIONS)


def points(run: Run) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = run.summary()["validation"]
    return found


def test_each_point_once_in_summary_and_curves(evaluated: Run) -> None:
    assert [(point["step"], point["tokens"]) for point in points(evaluated)] == [(s, 64 * s) for s in STEPS]
    seen = events(evaluated.folder)
    for tag in ("val/loss", "val/perplexity", "val/loss_original"):
        assert [step for step, _ in scalars(seen, tag)] == STEPS
        assert [tokens for tokens, _ in scalars(seen, f"by_tokens/{tag}")] == [64 * step for step in STEPS]
    losses = [point["loss"] for point in points(evaluated)]
    assert [loss for _, loss in scalars(seen, "val/loss")] == pytest.approx(losses)


def test_measuring_changes_no_step_and_gives_what_lightning_would(evaluated: Run, project: Project) -> None:
    # Lightning validates after every step here
    plain = project.fit(*OPTIONS[1:2], "--trainer.val_check_interval=1")
    expected = {point["step"]: point["loss"] for point in points(plain)}
    for point in points(evaluated):
        assert point["loss"] == pytest.approx(expected[point["step"]], rel=1e-6)
    assert points(evaluated)[-1]["loss"] == points(plain)[-1]["loss"]


def test_time_grows_with_tokens(evaluated: Run) -> None:
    seconds = [point["seconds"] for point in points(evaluated)]
    assert seconds == sorted(seconds)
    assert seconds[0] == 0 < seconds[2]
    assert seconds[-1] == evaluated.summary()["training_seconds"]
    assert seconds[-1] >= 640 / evaluated.summary()["tokens_per_second"] * (1 - 1e-9)


@pytest.mark.parametrize("step", [6, 8])  # before and after the point at 7, where no checkpoint is
def test_resumed_run_has_each_point_once(project: Project, evaluated: Run, step: int) -> None:
    cut = broken_off(project, step, *OPTIONS)
    result = resume(project, *OPTIONS)
    assert result.code == 0, result.err
    assert content(cut / "summary.json") == content(evaluated.folder / "summary.json")
    assert curves(cut) == curves(evaluated.folder)
    shutil.rmtree(cut)


def test_points_of_gathered_gradients(project: Project) -> None:
    options = ["--budget.evaluate_at=[0.5]", "--trainer.max_steps=4", "--trainer.accumulate_grad_batches=2"]
    run = project.fit(*options, "--trainer.val_check_interval=100", "--export.enabled=false")
    assert [(p["step"], p["tokens"]) for p in points(run)] == [(0, 0), (2, 256), (4, 512)]
