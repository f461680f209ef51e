"""Loggers and callbacks of Lightning's, named in the recipe, as in any project of Lightning."""

import csv
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.runs import RECIPE, Project, Run, events, scalars
from tests.cli.test_resume_auto import EARLY_END, broken_off, resume, same_run

CSV = {"class_path": "CSVLogger", "init_args": {"save_dir": "csv"}}


def with_trainer(project: Project, **options: Any) -> None:
    """Change the recipe's section trainer."""
    recipe = {**RECIPE, "trainer": {**RECIPE["trainer"], **options}}
    (project.root / "tiny.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")


def csv_points(folder: Path, tag: str) -> list[tuple[int, float]]:
    """(step, value) of each point of a CSVLogger."""
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        return [(int(row["step"]), float(row[tag])) for row in csv.DictReader(file) if row.get(tag)]


@pytest.mark.parametrize("order", ["alone", "before another", "after another"])
def test_csv_logger_beside_tensorboard(project: Project, order: str) -> None:
    other = {"class_path": "CSVLogger", "init_args": {"save_dir": "other"}}
    with_trainer(project, logger={"alone": CSV, "before another": [CSV, other], "after another": [other, CSV]}[order])
    run = project.fit()
    assert (run.folder / "export" / "model.safetensors").is_file()
    found, folder = events(run.folder), project.root / "csv/lightning_logs/version_0"
    for tag in ("val/loss", "val/loss_original", "train/loss", "train/learning_rate", "train/tokens"):
        assert len(csv_points(folder, tag)) >= 3
        assert csv_points(folder, tag) == [(step, pytest.approx(value)) for step, value in scalars(found, tag)], tag
    assert [value for _, value in csv_points(folder, "val/loss")] == pytest.approx(run.validation())
    recorded = yaml.safe_load((folder / "hparams.yaml").read_text())
    assert recorded["collapse.layers_per_merge"] == 2


def test_named_tensorboard_logger_holds_the_run(project: Project) -> None:
    board = {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "boards", "name": "mine"}}
    with_trainer(project, logger=[CSV, board])
    result = project("fit", "--recipe", "tiny.yaml")
    assert result.code == 0, result.err
    folder = project.root / "boards/mine/version_0"
    assert (folder / "summary.json").is_file() and (folder / "export/config.json").is_file()
    assert not (project.root / "lightning_logs").exists()
    assert csv_points(project.root / "csv/lightning_logs/version_0", "val/loss")
    assert "--resume: goes on in the folder and curves of fit's own" in resume(project).err


def test_resume_with_two_loggers(project: Project) -> None:
    whole = project.fit(*EARLY_END).folder.rename(project.root / "whole")
    with_trainer(project, logger=[CSV])
    cut = broken_off(project, 5, *EARLY_END)
    result = resume(project, *EARLY_END)
    assert result.code == 0, result.err
    same_run(whole, cut)
    before, after = (csv_points(project.root / f"csv/lightning_logs/version_{n}", "train/loss") for n in (0, 1))
    assert [step for step, _ in after] == [4, 5, 6]  # a folder of its own, from the checkpoint on
    assert dict(scalars(events(whole), "train/loss")) == pytest.approx({**dict(before), **dict(after)})


def test_logger_may_be_added_on_resume(project: Project) -> None:
    broken_off(project, 5, *EARLY_END)
    with_trainer(project, logger=[CSV])
    result = resume(project, *EARLY_END)
    assert result.code == 0, result.err
    assert csv_points(project.root / "csv/lightning_logs/version_0", "train/loss")


def test_bad_input_leaves_no_folder_of_either_logger(project: Project) -> None:
    with_trainer(project, logger=[CSV])
    before = project.files()
    bad = ["--model.method", "lora", "--model.lora.targets", "[query]"]  # found when the loggers are open
    result = project("fit", "--recipe", "tiny.yaml", *bad)
    assert result.code == 2
    assert project.files() == before


def test_early_stopping_ends_a_run_that_is_exported(project: Project) -> None:
    stop = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss", "patience": 1, "min_delta": 100.0}}
    with_trainer(project, callbacks=[stop], max_steps=50)
    run = project.fit()
    assert [point["step"] for point in run.summary()["validation"]] == [0, 2, 4]
    assert project("verify", str(run.folder / "export")).code == 0
    assert [path.name for path in run.folder.glob("checkpoints/*")] == ["epoch=0-step=4.ckpt"]
    assert "nothing to resume" in resume(project).out


def test_early_stopping_goes_on_where_it_was(project: Project) -> None:
    stop = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss", "patience": 2, "min_delta": 100.0}}
    with_trainer(project, callbacks=[stop], max_steps=50)
    whole = project.fit().folder.rename(project.root / "whole")
    cut = broken_off(project, 5)
    config = yaml.safe_load((cut / "config.yaml").read_text())
    config["trainer"]["callbacks"] = yaml.safe_load((whole / "config.yaml").read_text())["trainer"]["callbacks"]
    (cut / "config.yaml").write_text(yaml.safe_dump(config))
    result = resume(project)
    assert result.code == 0, result.err
    assert Run(cut, result).summary()["steps"] == 6
    same_run(whole, cut)


def test_wandb_offline(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="no dependency")
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder = str(project.root / "wandb_logs")  # the test's folder is left before wandb ends
    logger = {"class_path": "WandbLogger", "init_args": {"offline": True, "save_dir": folder, "project": "tiny"}}
    with_trainer(project, logger=logger)
    run = project.fit()
    wandb.teardown()  # as at the end of the process; finish alone leaves its service still writing now and then
    assert (run.folder / "export/model.safetensors").is_file()
    (kept,) = project.root.glob("wandb_logs/wandb/offline-run-*/run-*.wandb")
    content = kept.read_bytes()
    for tag in (b"val/loss", b"val/loss_original", b"train/loss", b"collapse.layers_per_merge"):
        assert tag in content


def test_stopped_early_and_killed_before_its_export(project: Project) -> None:
    stop = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/loss", "patience": 1, "min_delta": 100.0}}
    with_trainer(project, callbacks=[stop], max_steps=50)
    run = project.fit()
    whole = shutil.copytree(run.folder, project.root / "whole")
    (run.folder / "summary.json").unlink()
    shutil.rmtree(run.folder / "export")
    result = resume(project)
    assert result.code == 0, result.err
    same_run(whole, run.folder)
