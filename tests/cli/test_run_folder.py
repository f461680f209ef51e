"""Whose a run's folder is, where it lies, and what is refused before anything is written to one."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from laco_train.cli.record import take_folder
from tests.cli.runs import Project, Result, environment, events, scalars
from tests.cli.test_resume_auto import broken_off, resume


class Overtaken(TensorBoardLogger):
    """Looked for the next number before another process took it."""

    looked = False

    def _get_next_version(self) -> int:
        number = super()._get_next_version()
        number -= 0 if self.looked else 1
        self.looked = True
        return number


def refused(result: Result, key: str, problem: str) -> None:
    """In one line that names `key`."""
    assert result.code == 2, result.out
    (line,) = (line for line in result.err.splitlines() if line.startswith("laco_train: "))
    assert line.startswith(f"laco_train: error: {key}: ") and problem in line
    assert "Traceback" not in result.err


def kept(folder: Path) -> dict[str, bytes]:
    """What a run goes on from, and what says how it began."""
    names = ("config.yaml", "collapse_plan.json", "checkpoints/*.ckpt")
    return {path.name: path.read_bytes() for name in names for path in folder.glob(name)}


def test_a_number_that_another_process_took_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "tiny" / "version_0").mkdir(parents=True)
    logger = Overtaken(tmp_path, name="tiny")
    take_folder(Trainer(accelerator="cpu", logger=logger), None)
    assert logger.log_dir == str(tmp_path / "tiny" / "version_1")
    assert (tmp_path / "tiny" / "version_1").is_dir()


def test_a_folder_that_holds_a_run_is_no_place_for_another(project: Project) -> None:
    here = ["--trainer.logger", "false", "--trainer.default_root_dir", "out"]
    first = project("fit", "--recipe", "tiny.yaml", *here, "--trainer.max_steps", "2")
    assert first.code == 0, first.err
    assert {"config.yaml", "collapse_plan.json", "summary.json"} <= {
        path.name for path in (project.root / "out").iterdir()
    }
    before = project.files()
    refused(project("fit", "--recipe", "tiny.yaml", *here), "trainer.logger", "out, which holds another")
    assert project.files() == before
    (checkpoint,) = project.root.glob("out/checkpoints/*.ckpt")
    on = project("fit", "--recipe", "tiny.yaml", *here, "--ckpt_path", str(checkpoint), "--export.enabled", "false")
    assert on.code == 0, on.err
    shutil.rmtree(project.root / "out" / "export")
    exported = project("export", "--checkpoint", "out", "--output", "exported")
    assert exported.code == 0, exported.err
    assert "step=6.ckpt" in exported.out


class Rival(Callback):
    """Another process that is started with the same arguments while this one searches."""

    found: ClassVar[list[subprocess.CompletedProcess[str]]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing but the event file is in the folder yet."""
        command = [sys.executable, "-m", "laco_train", "fit", "--recipe", "tiny.yaml", *SAME]
        before = {path: path.read_bytes() for path in Path(str(trainer.log_dir)).glob("events.*")}
        self.found.append(subprocess.run(command, capture_output=True, text=True, env=environment(), check=False))
        assert before and {path: path.read_bytes() for path in before} == before


BOARD = "{class_path: TensorBoardLogger, init_args: {save_dir: boards, name: mine, version: 3}}"
SAME = [f"--trainer.logger={BOARD}", "--export.enabled", "false"]


def test_a_version_is_not_taken_twice(project: Project) -> None:
    Rival.found.clear()
    result = project("fit", "--recipe", "tiny.yaml", *SAME, f"--trainer.callbacks+={__name__}.Rival")
    assert result.code == 0, result.err
    (rival,) = Rival.found
    refused(Result(rival.returncode, rival.stdout, rival.stderr), "trainer.logger", "another process is writing boards")
    folder = project.root / "boards" / "mine" / "version_3"
    assert (folder / "summary.json").is_file() and scalars(events(folder), "train/loss")
    again = project("fit", "--recipe", "tiny.yaml", *SAME)
    refused(again, "trainer.logger", "boards/mine/version_3, which holds another")


def test_a_csv_logger_deletes_nothing_of_another_run(project: Project) -> None:
    csv = "--trainer.logger={class_path: CSVLogger, init_args: {save_dir: csv, version: 3}}"
    run = project.fit(csv, "--export.enabled", "false")
    metrics = project.root / "csv" / "lightning_logs" / "version_3" / "metrics.csv"
    before = metrics.read_text()
    assert "train/loss" in before and run.folder.name == "version_0"
    refused(project("fit", "--recipe", "tiny.yaml", csv), "trainer.logger", "version_3, which is there already")
    assert metrics.read_text() == before
    assert [path.name for path in project.root.glob("lightning_logs/tiny/*")] == ["version_0"]


@pytest.mark.parametrize("there", [False, True], ids=["new", "there before"])
@pytest.mark.parametrize("logger", ["true", "false", f"[{BOARD}]"], ids=["own", "none", "named"])
def test_what_is_refused_leaves_no_folder(project: Project, logger: str, there: bool) -> None:
    if there:
        (project.root / "new" / "deep").mkdir(parents=True)
    before = project.files()
    root = ["--trainer.default_root_dir", "new/deep", f"--trainer.logger={logger}"]
    many = ["--data.batch_size", "1000"]  # found when the folder is made
    refused(project("fit", "--recipe", "tiny.yaml", *root, *many), "data.batch_size", "make no batch of 1000")
    assert project.files() == before


def test_the_users_folder(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    home = project.root / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    there = "--trainer.default_root_dir=~/runs"
    assert project("fit", "--recipe", "tiny.yaml", there).code == 0
    (run,) = home.glob("runs/lightning_logs/tiny/version_*")
    assert {"config.yaml", "summary.json", "checkpoints", "export"} <= {path.name for path in run.iterdir()}
    assert not (project.root / "~").exists()
    again = project("fit", "--recipe", "tiny.yaml", there, "--resume", "auto")
    assert again.code == 0 and "is finished" in again.out
    compared = project("compare", "--output=~/page", str(run))
    assert compared.code == 0, compared.err
    assert (home / "page").is_dir() and not (project.root / "~").exists()


@pytest.mark.parametrize("role", ["train", "validation"])
def test_another_text_than_the_run_began_with(project: Project, role: str) -> None:
    folder = broken_off(project, 5)
    path = project.root / f"{role}.jsonl"
    then = path.read_text()
    path.write_text(
        then + '{"text": "A line that was not there when the run began, long enough for a block of tokens."}\n'
    )
    before = kept(folder)
    refused(resume(project), f"data.{role}", "is another text than when the run began")
    assert kept(folder) == before
    path.write_text(then)
    assert resume(project).code == 0
    assert (folder / "summary.json").exists()


def test_a_run_that_time_ended(project: Project) -> None:
    limits = ["--trainer.max_steps", "100000", "--export.enabled", "false"]
    ended = project("fit", "--recipe", "tiny.yaml", *limits, "--trainer.max_time", "00:00:00:01")
    assert ended.code == 0, ended.err
    again = resume(project, *limits, "--trainer.max_time", "00:01:00:00")
    assert again.code == 0
    (checkpoint,) = project.root.glob("lightning_logs/tiny/version_0/checkpoints/*.ckpt")
    said = again.out.splitlines()[-1]
    further = project(
        "fit", "--recipe", "tiny.yaml", *limits, "--trainer.max_time", "00:00:00:03", "--ckpt_path", str(checkpoint)
    )
    assert further.code == 0, further.err
    steps = [
        json.loads(path.read_text())["steps"]
        for path in sorted(project.root.glob("lightning_logs/tiny/*/summary.json"))
    ]
    assert len(steps) == 2 and steps[0] < steps[1]
    assert "trainer.max_time ended it after step" in said and said.endswith(
        f"--ckpt_path {checkpoint.relative_to(project.root)}."
    )


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("max_steps", "0", "nothing would train"),
        ("max_epochs", "0", "nothing would train"),
        ("limit_train_batches", "0", "nothing would train"),
        ("limit_val_batches", "0", "unlike texts"),
        ("limit_val_batches", "1", "unlike texts"),
        ("limit_val_batches", "0.5", "unlike texts"),
        ("overfit_batches", "2", "unlike texts"),
        ("val_check_interval", "0", "must be above 0"),
        ("accumulate_grad_batches", "0", "must be 1 or more"),
    ],
)
def test_limits_that_leave_nothing(project: Project, key: str, value: str, problem: str) -> None:
    before = project.files()
    refused(project("fit", "--recipe", "tiny.yaml", f"--trainer.{key}", value), f"trainer.{key}", problem)
    assert project.files() == before


def test_validation_that_no_epoch_comes_to(project: Project) -> None:
    options = ["--trainer.check_val_every_n_epoch", "1", "--trainer.val_check_interval", "100000"]
    result = project("fit", "--recipe", "tiny.yaml", *options)
    refused(result, "trainer.val_check_interval", "more than the")
    assert "Validation loss" not in result.out  # told before the search
    assert not list(project.root.glob("lightning_logs/*"))


@pytest.mark.parametrize(
    ("arguments", "key", "problem"),
    [
        (["--model.dtype=float32", "--trainer.precision=bf16-true"], "model.dtype", "trainer.precision bf16-true"),
        (["--model.dtype=bfloat16", "--trainer.precision=16-true"], "model.dtype", "trainer.precision 16-true"),
    ],
)
def test_weights_of_two_types(project: Project, arguments: list[str], key: str, problem: str) -> None:
    refused(project("fit", "--recipe", "tiny.yaml", *arguments), key, problem)


def test_a_recipe_of_nobody(project: Project) -> None:
    refused(project("fit", "--recipe", "~nosuchuser/x.yaml"), "--recipe", "no file")


def test_validate_takes_one_model(project: Project) -> None:
    rounds = ["--rounds", "[{target_depth: 4}]", "--collapse.similarity_threshold", "null"]
    refused(project("validate", "--recipe", "tiny.yaml", *rounds), "rounds", "make several models")


@pytest.mark.parametrize(("logger", "problem"), [("true", "can't be made"), ("false", "which is no folder")])
def test_a_root_that_is_no_folder(project: Project, logger: str, problem: str) -> None:
    (project.root / "file").write_text("")
    before = project.files()
    result = project("fit", "--recipe", "tiny.yaml", "--trainer.default_root_dir", "file", f"--trainer.logger={logger}")
    refused(result, "trainer.default_root_dir", problem)
    assert project.files() == before


def test_one_step_as_a_trial_leaves_nothing(project: Project) -> None:
    before = set(project.files())
    result = project("fit", "--recipe", "tiny.yaml", "--trainer.fast_dev_run", "true")
    assert result.code == 0, result.err
    assert set(project.files()) == before and not (project.root / "None").exists()


def test_validation_by_time(project: Project) -> None:
    result = project("fit", "--recipe", "tiny.yaml", "--trainer.val_check_interval", "00:00:10:00")
    assert result.code == 0, result.err


def test_a_prompt_longer_than_the_positions_is_told_before_training(project: Project) -> None:
    (project.root / "prompts.txt").write_text("river " * 400)
    before = project.files()
    asked = ["--evaluation.samples", "true", "--evaluation.prompts", "prompts.txt"]
    refused(
        project("fit", "--recipe", "tiny.yaml", *asked), "evaluation.prompts", "more than the model's 256 positions"
    )
    assert project.files() == before
