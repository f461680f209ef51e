"""Going on from a checkpoint: resume, validate and the export verb."""

import json
from pathlib import Path

import pytest
import torch

from tests.cli.runs import KEEP_ALL, Project, Run, events, same_bytes, scalars

# a search would end the run: there is no such calibration text
NO_SEARCH = ["--collapse.calibration", "missing.txt"]


def resume(project: Project, run: Run, step: int, *arguments: str) -> Run:
    return project.fit("--ckpt_path", str(run.checkpoint(step)), *NO_SEARCH, *arguments)


def test_resumed_run_never_searches_and_ends_like_the_uninterrupted(shared_project: Project, run: Run) -> None:
    resumed = resume(shared_project, run, 2)
    assert resumed.folder != run.folder
    whole, again = run.state(), resumed.state()
    assert whole["state_dict"].keys() == again["state_dict"].keys()
    differing = [n for n, w in whole["state_dict"].items() if not torch.equal(w, again["state_dict"][n])]
    assert differing == []
    torch.testing.assert_close(again["optimizer_states"], whole["optimizer_states"], rtol=0, atol=0)
    assert again["lr_schedulers"] == whole["lr_schedulers"]
    assert resumed.validation() == run.validation()
    assert resumed.summary()["losses"] == run.summary()["losses"]
    assert resumed.summary()["tokens"] == run.summary()["tokens"]
    plan = (run.folder / "collapse_plan.json").read_bytes()
    assert (resumed.folder / "collapse_plan.json").read_bytes() == plan
    points = scalars(events(resumed.folder), "by_tokens/val/loss")
    assert points == scalars(events(run.folder), "by_tokens/val/loss")[2:]
    same_bytes(run.folder / "export", resumed.folder / "export")


def test_without_a_checkpoint_the_search_is_missed(project: Project) -> None:
    assert project("fit", "--recipe", "tiny.yaml", *NO_SEARCH).code == 2


def test_accumulating_run_goes_on_exactly(project: Project) -> None:
    options = ["--trainer.accumulate_grad_batches=2", "--trainer.max_steps=4", "--trainer.val_check_interval=4"]
    whole = project.fit(*options, *KEEP_ALL)
    resumed = resume(project, whole, 2, *options)
    expected = whole.state(4)["state_dict"]
    assert [n for n, w in resumed.state(4)["state_dict"].items() if not torch.equal(w, expected[n])] == []


def test_lora_goes_on_exactly(project: Project) -> None:
    options = ["--model.method", "lora", "--model.lora.rank", "2"]
    whole = project.fit(*options, *KEEP_ALL)
    resumed = resume(project, whole, 4, *options)
    expected = whole.state()["state_dict"]
    assert [n for n, w in resumed.state()["state_dict"].items() if not torch.equal(w, expected[n])] == []


def test_validate_gives_the_last_validation_loss(shared_project: Project, run: Run) -> None:
    before = set(shared_project.root.glob("lightning_logs/tiny/*"))
    options = ["--ckpt_path", str(run.checkpoint()), *NO_SEARCH]
    result = shared_project("validate", "--recipe", "tiny.yaml", *options)
    assert result.code == 0, result.err
    (folder,) = set(shared_project.root.glob("lightning_logs/tiny/*")) - before
    ((_, loss),) = scalars(events(folder), "val/loss")
    assert loss == pytest.approx(run.validation()[-1], rel=1e-6)
    assert "val/loss" in result.out


def test_validate_without_a_checkpoint_is_the_loss_right_after_the_collapse(shared_project: Project, run: Run) -> None:
    before = set(shared_project.root.glob("lightning_logs/tiny/*"))
    assert shared_project("validate", "--recipe", "tiny.yaml").code == 0
    (folder,) = set(shared_project.root.glob("lightning_logs/tiny/*")) - before
    ((_, loss),) = scalars(events(folder), "val/loss")
    assert loss == pytest.approx(run.validation()[0], rel=1e-6)


def export(project: Project, checkpoint: Path, *options: str) -> Path:
    output = project.root / "exported" / checkpoint.stem
    result = project("export", "--checkpoint", str(checkpoint), "--output", str(output), *options)
    assert result.code == 0, result.err
    return output


def test_export_verb_writes_what_the_run_wrote(shared_project: Project, run: Run) -> None:
    same_bytes(export(shared_project, run.checkpoint()), run.folder / "export")


def test_export_verb_writes_what_a_lora_run_wrote(project: Project) -> None:
    run = project.fit("--model.method", "lora", "--model.lora.rank", "2", "--trainer.max_steps", "2")
    same_bytes(export(project, run.checkpoint(2)), run.folder / "export")


def test_export_verb_casts(shared_project: Project, run: Run) -> None:
    folder = export(shared_project, run.checkpoint(2), "--dtype", "bfloat16")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_checkpoint_of_another_method_is_refused(shared_project: Project, run: Run) -> None:
    options = ["--ckpt_path", str(run.checkpoint()), "--model.method", "lora"]
    result = shared_project("fit", "--recipe", "tiny.yaml", *options)
    assert result.code == 2
    assert result.err.splitlines()[-1].startswith("laco_train: error: --ckpt_path: its weights are not those")
