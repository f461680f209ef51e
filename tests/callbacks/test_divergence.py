"""A loss that is no number stops the run, names the step and the last good checkpoint, and exports nothing."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.cli.runs import KEEP_ALL, Project


def poisoned(project: Project, step: int, *arguments: str, saving: Sequence[str] = KEEP_ALL) -> str:
    """Break a weight after `step` optimizer steps; the one line that the run stops with."""
    callbacks = [*saving, "--trainer.callbacks+=tests.cli.runs.Poison", f"--trainer.callbacks.step={step}"]
    result = project("fit", "--recipe", "tiny.yaml", *callbacks, *arguments)
    assert result.code == 1
    lines = [line for line in result.err.splitlines() if line.startswith("laco_train: stopped: ")]
    assert lines == result.err.splitlines()[-1:]
    assert "Traceback" not in result.err
    assert not list(project.root.rglob("export*"))
    return lines[0]


def saved(project: Project) -> list[Path]:
    return sorted(project.root.rglob("*.ckpt"))


def test_step_and_last_good_checkpoint_are_named(project: Project) -> None:
    line = poisoned(project, 3)
    assert "the loss was not finite at step 4;" in line
    (good,) = saved(project)
    assert good.name == "epoch=0-step=2.ckpt"
    assert f"last good checkpoint: {good.relative_to(project.root)};" in line.replace(f"{project.root}/", "")
    weights = torch.load(good, weights_only=True)["state_dict"]
    assert all(torch.isfinite(weight).all() for weight in weights.values())


def test_no_checkpoint_yet(project: Project) -> None:
    assert "not finite at step 1; last good checkpoint: none was saved yet;" in poisoned(project, 0)
    assert saved(project) == []


def test_between_points_of_the_training_curve(project: Project) -> None:
    line = poisoned(project, 2, "--trainer.log_every_n_steps", "1000")
    assert "the loss was not finite at step 3;" in line  # seen at the validation after step 4
    assert [path.name for path in saved(project)] == ["epoch=0-step=2.ckpt"]


def test_a_checkpoint_between_validations_is_not_broken(project: Project) -> None:
    never = ["--trainer.log_every_n_steps", "1000", "--trainer.val_check_interval", "1000"]
    line = poisoned(project, 2, *never, saving=[*KEEP_ALL, "--trainer.callbacks.every_n_train_steps=1"])
    assert "the loss was not finite at step 3;" in line
    assert [path.name for path in saved(project)] == ["epoch=0-step=1.ckpt", "epoch=0-step=2.ckpt"]
    assert "epoch=0-step=2.ckpt;" in line


def test_at_the_last_step(project: Project) -> None:
    line = poisoned(project, 2, "--trainer.log_every_n_steps", "1000", "--trainer.max_steps", "3")
    assert "the loss was not finite at step 3;" in line


@pytest.mark.parametrize("every", ["1", "2", "1000"])
def test_a_step_that_breaks_the_model_after_a_finite_loss(project: Project, every: str) -> None:
    options = ["--trainer.callbacks.at_once=true", "--trainer.max_steps=1", f"--trainer.val_check_interval={every}"]
    assert "not finite at step 1; last good checkpoint: none was saved yet;" in poisoned(project, 1, *options)
    assert saved(project) == []
