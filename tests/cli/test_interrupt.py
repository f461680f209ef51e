"""Ctrl-C: a run in training saves and says how to go on; everything else ends in one line. See test_resume_auto.py."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

from laco_train.manifest import write_manifest
from tests.cli.runs import Project, environment
from tests.cli.test_resume_auto import EARLY_END, at

INTERRUPTS_ITSELF = """
import os, signal, sys, time
def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
class Dying:
    def __del__(self):
        interrupt()
def look(event, arguments):
    if event == "open" and str(arguments[0]).endswith("manifest.json"):
        {interrupt}
        time.sleep(10)
sys.addaudithook(look)
from laco_train.cli import main
sys.exit(main(["verify", sys.argv[1]]))
"""


class InterruptTwice(Callback):
    """Two SIGINTs once three optimizer steps are done."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        """The second one doesn't wait."""
        if trainer.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)


class InterruptEarly(Callback):
    """SIGINT where a fit searches for layers."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before training takes signals over."""
        os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def handler() -> Iterator[None]:
    """Lightning ignores SIGINT once it has seen one."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def checkpoints(project: Project) -> list[str]:
    return [path.name for path in project.root.glob("lightning_logs/tiny/version_0/checkpoints/*")]


@pytest.mark.usefixtures("handler")
def test_first_interrupt_saves(project: Project, capfd: pytest.CaptureFixture[str]) -> None:
    result = project("fit", "--recipe", "tiny.yaml", *EARLY_END, *at(3, "SIGINT"))
    assert result.code == 130, result.err
    assert checkpoints(project) == ["epoch=0-step=3.ckpt"]
    words = ["SIGINT: stopped after step 3, saved as ", checkpoints(project)[0], "; go on with --resume auto."]
    assert [word for word in words if word not in result.out.splitlines()[-1]] == []
    assert "again to stop at once" in capfd.readouterr().err


@pytest.mark.usefixtures("handler")
def test_second_interrupt_is_immediate(project: Project, caplog: pytest.LogCaptureFixture) -> None:
    result = project("fit", "--recipe", "tiny.yaml", *EARLY_END, f"--trainer.callbacks+={__name__}.InterruptTwice")
    assert (result.code, result.err.splitlines()[-1]) == (130, "laco_train: interrupted")
    assert "KeyboardInterrupt" not in result.out + result.err + caplog.text
    assert checkpoints(project) == ["epoch=0-step=2.ckpt"]


@pytest.mark.usefixtures("handler")
def test_an_interrupt_that_is_ignored_stays_so(project: Project) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell's script does for what it leaves in the background
    result = project("fit", "--recipe", "tiny.yaml", *EARLY_END, *at(3, "SIGINT"))
    assert result.code == 0, result.err


@pytest.mark.usefixtures("handler")
def test_interrupt_before_training(project: Project) -> None:
    result = project("fit", "--recipe", "tiny.yaml", f"--trainer.callbacks+={__name__}.InterruptEarly")
    assert (result.code, result.err.splitlines()[-1]) == (130, "laco_train: interrupted")
    assert "KeyboardInterrupt" not in result.out + result.err


class Keyboard(Callback):
    """SIGINT to both processes of a run, to rank 1 first."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Where rank 0 searches and rank 1 waits for it."""
        if trainer.is_global_zero:
            time.sleep(2)
        os.kill(os.getpid(), signal.SIGINT)


def test_interrupt_of_two_processes_is_one_line(project: Project) -> None:
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.callbacks+=tests.cli.test_interrupt.Keyboard"]
    done = subprocess.run(
        [sys.executable, "-m", "laco_train", "fit", "--recipe", "tiny.yaml", *two],
        cwd=project.root, env=environment(), capture_output=True, text=True, check=False, start_new_session=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr.splitlines()[-1]) == (130, "laco_train: interrupted")
    assert "Traceback" not in done.stderr and done.stderr.count("interrupted") == 1


@pytest.mark.parametrize("interrupt", ["interrupt()", "Dying()"], ids=["anywhere", "in a destructor"])
def test_interrupt_of_another_verb(tmp_path: Path, interrupt: str) -> None:
    write_manifest(tmp_path, {})
    command = [sys.executable, "-c", INTERRUPTS_ITSELF.format(interrupt=interrupt), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "laco_train: interrupted\n")


def test_signal_without_checkpoints(project: Project) -> None:
    options = ["--trainer.enable_checkpointing", "false", *at(3, "SIGTERM")]
    result = project("fit", "--recipe", "tiny.yaml", *EARLY_END, *options)
    assert (result.code, result.out.splitlines()[-1]) == (143, "SIGTERM: stopped after step 3, without a checkpoint.")
