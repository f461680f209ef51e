"""Steps with gradients that are no numbers are left out; too many in a row stop the run, which exports nothing."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.cli.runs import KEEP_ALL, Project, events, scalars

BOUND = ["--model.optimizer.max_skipped_steps", "2"]
NEVER_LOGGED = ["--trainer.log_every_n_steps", "1000"]


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


def test_steps_without_finite_gradients_are_left_out_and_counted(project: Project) -> None:
    spoil = ["--trainer.callbacks+=tests.cli.runs.SpoilGradients", "--trainer.callbacks.steps=[2, 3]"]
    run = project.fit(*KEEP_ALL, *spoil)
    before, after, later = (run.state(step)["state_dict"] for step in (2, 4, 6))
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert [name for name in before if not torch.equal(after[name], later[name])] != []
    moments = run.state(4)["optimizer_states"][0]["state"]
    assert {int(values["step"]) for values in moments.values()} == {2}
    assert all(torch.isfinite(values["exp_avg"]).all() for values in moments.values())
    counts = scalars(events(run.folder), "train/skipped_steps")
    assert [value for _, value in counts] == [0, 0, 1, 2, 2, 2]
    norms = [value for _, value in scalars(events(run.folder), "train/gradient_norm")]
    assert [norm == norm and abs(norm) != float("inf") for norm in norms] == [True, True, False, False, True, True]


def test_the_count_goes_on_after_a_resume(project: Project) -> None:
    spoil = ["--trainer.callbacks+=tests.cli.runs.SpoilGradients", "--trainer.callbacks.steps=[0, 4]"]
    run = project.fit(*KEEP_ALL, *spoil)
    resumed = project.fit("--ckpt_path", str(run.checkpoint(2)), *spoil)
    counts = [value for _, value in scalars(events(resumed.folder), "train/skipped_steps")]
    assert counts == [1, 1, 2, 2]


def test_too_many_in_a_row_stop_the_run_and_name_the_last_good_checkpoint(project: Project) -> None:
    line = poisoned(project, 2, *BOUND)
    assert "2 steps in a row had gradients that were not finite, at step 4;" in line
    (good,) = saved(project)
    assert good.name == "epoch=0-step=2.ckpt"
    assert f"last good checkpoint: {good.relative_to(project.root)};" in line.replace(f"{project.root}/", "")
    weights = torch.load(good, weights_only=True)["state_dict"]
    assert all(torch.isfinite(weight).all() for weight in weights.values())


def test_no_checkpoint_yet(project: Project) -> None:
    line = poisoned(project, 0, *BOUND)
    assert "not finite, at step 2; last good checkpoint: none was saved yet;" in line
    assert saved(project) == []


def test_a_broken_model_fails_at_its_validation(project: Project) -> None:
    line = poisoned(project, 2, *NEVER_LOGGED)  # below the bound, but its weights are infinite
    assert "the loss was not finite at step 4;" in line
    assert [path.name for path in saved(project)] == ["epoch=0-step=2.ckpt"]


def test_a_checkpoint_between_validations_is_not_broken(project: Project) -> None:
    never = [*NEVER_LOGGED, "--trainer.val_check_interval", "1000"]
    line = poisoned(project, 2, *never, saving=[*KEEP_ALL, "--trainer.callbacks.every_n_train_steps=1"])
    assert "a weight was not finite at step 3;" in line
    assert [path.name for path in saved(project)] == ["epoch=0-step=1.ckpt", "epoch=0-step=2.ckpt"]
    assert "epoch=0-step=2.ckpt;" in line


@pytest.mark.parametrize("every", ["1", "2", "1000"])
def test_a_model_broken_after_its_last_step(project: Project, every: str) -> None:
    options = ["--trainer.callbacks.at_once=true", "--trainer.max_steps=1", f"--trainer.val_check_interval={every}"]
    assert "not finite at step 1; last good checkpoint: none was saved yet;" in poisoned(project, 1, *options)
    assert saved(project) == []
