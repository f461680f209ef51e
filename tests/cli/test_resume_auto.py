"""`fit --resume auto`: which run goes on, what is refused, and what a resumed run leaves."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from benchmarks.soak import content, curves
from laco_train.callbacks.newest_checkpoint import NewestCheckpoint
from laco_train.cli.resume import HARMLESS, earlier_run, is_harmless, newest_good
from tests.cli.runs import RECIPE, Project, Result, Run, same_bytes

EARLY_END = ["--trainer.max_steps", "7"]  # no multiple of the interval of validation


class At(Callback):
    """Does something real to this process once `step` optimizer steps are done."""

    def __init__(self, step: int, what: str):
        self.step, self.what = step, what

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Once."""
        if trainer.global_step != self.step:
            return
        if self.what == "full":
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        elif self.what == "stop":
            raise Stopped
        else:
            os.kill(os.getpid(), signal.Signals[self.what])


class Stopped(BaseException):
    """Ends a fit at once."""


def at(step: int, what: str) -> list[str]:
    name = f"{__name__}.At"
    return [f"--trainer.callbacks+={name}", f"--trainer.callbacks.step={step}", f"--trainer.callbacks.what={what}"]


def forget_callback(folder: Path) -> None:
    """The run's recipe without the callback that ended it, which would be refused as a change."""
    path = folder / "config.yaml"
    values = yaml.safe_load(path.read_text())
    values["trainer"]["callbacks"] = None
    path.write_text(yaml.safe_dump(values))


def broken_off(project: Project, step: int, *arguments: str) -> Path:
    """Folder of a fit that ended without notice after `step` optimizer steps."""
    with pytest.raises(Stopped):
        project("fit", "--recipe", "tiny.yaml", *arguments, *at(step, "stop"))
    (folder,) = project.root.glob("lightning_logs/tiny/version_*")
    forget_callback(folder)
    return folder


def resume(project: Project, *arguments: str) -> Result:
    return project("fit", "--recipe", "tiny.yaml", "--resume", "auto", *arguments)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("checkpoints/*.ckpt")
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return state


def same_run(one: Path, other: Path) -> None:
    """Assert that two runs left the same, but for what the clock says."""
    assert curves(one) == curves(other)
    exported = [f"export/{path.name}" for path in (one / "export").iterdir()]
    assert len(exported) == len(list((other / "export").iterdir()))
    for name in ("summary.json", "collapse_plan.json", *exported):
        assert content(one / name) == content(other / name), name
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def refused(result: Result, key: str) -> str:
    assert result.code == 2
    line = result.err.splitlines()[-1]
    assert line.startswith(f"laco_train: error: {key}: ")
    return line


@pytest.fixture(scope="module")
def whole(shared_project: Project) -> Run:
    """An unbroken run of seven steps."""
    return shared_project.fit(*EARLY_END)


@pytest.fixture
def cut(project: Project) -> Path:
    """The folder of a run broken off after five of seven steps."""
    return broken_off(project, 5, *EARLY_END)


def test_goes_on_in_the_same_folder_and_curves(project: Project, whole: Run, cut: Path) -> None:
    config = (cut / "config.yaml").read_bytes()
    result = resume(project, *EARLY_END)
    assert result.code == 0, result.err
    assert "epoch=0-step=4.ckpt" in result.out
    assert [folder.name for folder in cut.parent.iterdir()] == [cut.name]
    assert (cut / "config.yaml").read_bytes() == config
    same_run(whole.folder, cut)


def test_the_last_step_has_a_checkpoint_and_nothing_else_stays(whole: Run) -> None:
    assert [path.name for path in whole.folder.glob("checkpoints/*")] == ["epoch=1-step=7.ckpt"]
    assert torch.load(whole.checkpoint(7), weights_only=True)["global_step"] == 7


def test_finished_run_is_left_alone(shared_project: Project, whole: Run) -> None:
    before = shared_project.files()
    result = resume(shared_project, *EARLY_END)
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[-1].endswith("is finished: there is nothing to resume.")
    assert shared_project.files() == before


@pytest.mark.parametrize("missing", ["export", "summary.json"])
def test_run_killed_while_it_exported_is_finished(project: Project, whole: Run, missing: str) -> None:
    folder = project.root / "lightning_logs" / "tiny" / "version_0"
    shutil.copytree(whole.folder, folder)
    (folder / "summary.json").unlink()
    if missing == "export":
        shutil.move(folder / "export", folder / "export.partial-123")
    result = resume(project, *EARLY_END)
    assert result.code == 0, result.err
    assert not list(folder.glob("*.partial*"))
    same_run(whole.folder, folder)


def test_without_a_checkpoint_it_begins_anew_in_the_same_folder(project: Project, whole: Run) -> None:
    cut = broken_off(project, 1, *EARLY_END)
    result = resume(project, *EARLY_END)
    assert result.code == 0, result.err
    assert "has no checkpoint yet: it begins anew" in result.out
    assert [folder.name for folder in cut.parent.iterdir()] == [cut.name]
    same_run(whole.folder, cut)


def test_without_an_earlier_run_it_is_the_first(project: Project, whole: Run) -> None:
    result = resume(project, *EARLY_END)
    assert result.code == 0, result.err
    assert "this one is the first" in result.out
    same_run(whole.folder, project.root / "lightning_logs/tiny/version_0")


def test_run_names_the_folder(project: Project, whole: Run, cut: Path) -> None:
    project.fit("--trainer.max_steps", "1")
    moved = cut.rename(project.root / "mine")
    result = resume(project, "--run", "mine", *EARLY_END)
    assert result.code == 0, result.err
    same_run(whole.folder, moved)


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "cut short":
        del data[len(data) // 2 :]
    else:
        data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["cut short", "one bit"])
def test_damaged_checkpoint_is_passed_over(project: Project, whole: Run, cut: Path, how: str) -> None:
    good = cut / "checkpoints" / "epoch=0-step=4.ckpt"
    damage(shutil.copy(good, good.with_name("epoch=0-step=6.ckpt")), how)
    result = resume(project, *EARLY_END)
    assert result.code == 0, result.err
    (line,) = [line for line in result.out.splitlines() if line.startswith("Passing over")]
    assert "step=6.ckpt" in line
    same_run(whole.folder, cut)


def test_newest_is_by_steps_done_not_by_time(project: Project, tmp_path: Path) -> None:
    run = project.fit("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_top_k=-1")
    os.utime(run.checkpoint(2))
    assert newest_good(run.folder / "checkpoints") == run.checkpoint(6)


def test_newest_folder_that_began(tmp_path: Path) -> None:
    for number in (9, 10, 11):
        (tmp_path / f"version_{number}").mkdir()
    for number in (9, 10):
        (tmp_path / f"version_{number}" / "config.yaml").touch()
    found = earlier_run(tmp_path, None)
    assert found is not None and found.folder.name == "version_10"


def test_changed_recipe_is_refused_by_key(project: Project, cut: Path) -> None:
    before = project.files()
    changes = ["--model.optimizer.learning_rate", "0.5", "--data.block_size", "16", "--trainer.max_steps", "9"]
    line = refused(resume(project, *changes), "--resume")
    assert "data.block_size: 32 -> 16; model.optimizer.learning_rate: 0.01 -> 0.5; trainer.max_steps: 7 -> 9" in line
    assert project.files() == before


def test_harmless_changes_are_not_refused(project: Project, cut: Path) -> None:
    changes = ["--data.num_workers", "1", "--export.enabled", "false", "--trainer.log_every_n_steps", "2"]
    result = resume(project, *EARLY_END, *changes)
    assert result.code == 0, result.err


def test_harmless_keys_exist(project: Project) -> None:
    project.fit("--trainer.max_steps", "1", "--export.enabled", "false")
    (path,) = project.root.glob("lightning_logs/tiny/*/config.yaml")
    values = yaml.safe_load(path.read_text())
    for key in HARMLESS:
        *sections, last = key.split(".")
        place = values
        for section in sections:
            place = place[section]
        assert last == "*" or any(name.startswith(last.rstrip("*")) for name in place), key
    assert not is_harmless("data.seed")


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["--run", "nowhere"], "--run"),
        (["--run", "nowhere", "--resume", "auto"], "--run"),
        (["--resume", "auto", "--ckpt_path", "x.ckpt"], "--resume"),
        (["--resume", "auto", "--trainer.logger", "false"], "--resume"),
        (["--resume", "yes"], "resume"),
    ],
)
def test_options_that_make_no_sense(shared_project: Project, arguments: list[str], key: str) -> None:
    before = shared_project.files()
    refused(shared_project("fit", "--recipe", "tiny.yaml", *arguments), key)
    assert shared_project.files() == before


def test_dropout_is_drawn_again(project: Project) -> None:
    options = [*EARLY_END, "--model.method", "lora", "--model.lora.rank", "2", "--model.lora.dropout", "0.5"]
    unbroken = project.fit(*options).folder.rename(project.root / "unbroken")
    cut = broken_off(project, 5, *options)
    result = resume(project, *options)
    assert result.code == 0, result.err
    same_run(unbroken, cut)
    same_bytes(unbroken / "adapter", cut / "adapter")


def test_full_disk_keeps_the_checkpoint_before(project: Project, whole: Run) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        result = project("fit", "--recipe", "tiny.yaml", *EARLY_END, *at(3, "full"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert result.code == 1
    line = result.err.splitlines()[-1]
    assert line.startswith("laco_train: stopped: can't save ") and "File too large" in line
    (folder,) = project.root.glob("lightning_logs/tiny/version_*")
    assert [path.name for path in folder.glob("checkpoints/*")] == ["epoch=0-step=2.ckpt"]
    forget_callback(folder)
    assert resume(project, *EARLY_END).code == 0
    same_run(whole.folder, folder)


# step 3: between validations; 4: a validation follows; 7: the last
@pytest.mark.parametrize(("step", "saved"), [(3, 3), (4, 4), (7, 7)])
def test_sigterm_saves_and_leaves(project: Project, whole: Run, step: int, saved: int) -> None:
    result = project("fit", "--recipe", "tiny.yaml", *EARLY_END, *at(step, "SIGTERM"))
    assert result.code == 143
    assert f"stopped after step {saved}, saved as" in result.out.splitlines()[-1]
    (folder,) = project.root.glob("lightning_logs/tiny/version_*")
    assert [path.name.partition("-")[2] for path in folder.glob("checkpoints/*")] == [f"step={saved}.ckpt"]
    assert not (folder / "export").exists()
    forget_callback(folder)
    assert resume(project, *EARLY_END).code == 0
    same_run(whole.folder, folder)


def test_sigusr1_too_and_half_a_step_is_finished(project: Project) -> None:
    options = [*EARLY_END, "--trainer.accumulate_grad_batches", "2", "--trainer.max_steps", "5"]
    unbroken = project.fit(*options).folder.rename(project.root / "unbroken")
    result = project("fit", "--recipe", "tiny.yaml", *options, *at(2, "SIGUSR1"))
    assert result.code == 128 + signal.SIGUSR1
    (folder,) = project.root.glob("lightning_logs/tiny/version_*")
    forget_callback(folder)
    assert resume(project, *options).code == 0
    same_run(unbroken, folder)


def test_signal_before_training(project: Project) -> None:
    """From a callback of the recipe's, which come first; validation follows the first step."""
    early = ["--trainer.callbacks+=tests.distributed.faults.TerminatedEarly", "--trainer.val_check_interval", "1"]
    result = project("fit", "--recipe", "tiny.yaml", *EARLY_END, *early)
    assert result.code == 143
    assert "stopped after step 1, saved as" in result.out.splitlines()[-1]


def test_signals_are_given_back_where_the_last_save_fails(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> NoReturn:
        raise BufferError("no space left")

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    monkeypatch.setattr(NewestCheckpoint, "on_exception", full)
    with pytest.raises(BufferError, match="no space left"):
        project("fit", "--recipe", "tiny.yaml", *EARLY_END, *at(3, "SIGTERM"))
    assert {number: signal.getsignal(number) for number in before} == before


class StopValidation(Callback):
    """SIGTERM as validation begins."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning looks between batches."""
        os.kill(os.getpid(), signal.SIGTERM)


def test_signal_in_validate(project: Project) -> None:
    result = project("validate", "--recipe", "tiny.yaml", f"--trainer.callbacks+={__name__}.StopValidation")
    assert (result.code, result.out.splitlines()[-1]) == (143, "SIGTERM: stopped."), result.err


def test_signal_in_the_last_batch_of_an_epoch(project: Project) -> None:
    batches = len_epoch(project)
    options = ["--trainer.max_steps", str(batches + 5), "--trainer.val_check_interval", str(batches + 3)]
    unbroken = project.fit(*options).folder.rename(project.root / "unbroken")
    result = project("fit", "--recipe", "tiny.yaml", *options, *at(batches, "SIGTERM"))
    assert f"stopped after step {batches + 1}," in result.out
    (folder,) = project.root.glob("lightning_logs/tiny/version_*")
    forget_callback(folder)
    assert resume(project, *options).code == 0
    same_run(unbroken, folder)


def len_epoch(project: Project) -> int:
    """Batches of an epoch of the tiny project."""
    run = project.fit("--trainer.max_steps", "1", "--export.enabled", "false")
    blocks = run.state(1)["laco_train"]["data"]["train"]["blocks"]
    shutil.rmtree(project.root / "lightning_logs")
    assert RECIPE["data"]["batch_size"] == 2
    return int(blocks) // 2


def test_run_in_use_is_refused(project: Project, cut: Path) -> None:
    used = cut.with_name("version_1")  # this process may still hold the other
    shutil.copytree(cut, used)
    script = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    command = [sys.executable, "-c", script, str(used / ".in_use")]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    holder.stdout.readline()
    try:
        assert "another process" in refused(resume(project, *EARLY_END), "--resume")
    finally:
        holder.communicate("\n")
