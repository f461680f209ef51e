"""Whole runs of the program on a tiny model: a project folder, and the program called in this process."""

import contextlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from laco_train.cli import main

CALIBRATION = ["The river rises in the north and flows to the sea.", "A tokenizer splits text into pieces."]
TRAIN = [f"Document {i}: river {7 * i} rises in the hills and flows through three old towns." for i in range(40)]
VALIDATION = [f"Held out {i}: she had been a friend such as few possessed, number {3 * i}." for i in range(8)]
RECIPE: dict[str, Any] = {
    "seed_everything": 0,
    "model": {
        "source": "model",
        "optimizer": {"learning_rate": 0.01},
        "schedule": {"warmup_steps": 2, "final_ratio": 0.1},
    },
    "collapse": {"layers_per_merge": 2, "similarity_threshold": 0.3, "calibration": CALIBRATION},
    "data": {"train": "train.jsonl", "validation": "validation.jsonl", "block_size": 32, "batch_size": 2},
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 6,
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
        "gradient_clip_val": 1.0,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
    },
}
KEEP_ALL = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_top_k=-1"]


@dataclass(frozen=True)
class Result:
    """What a call of the program gave."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Project:
    """A folder to run in: model/, train.jsonl, validation.jsonl and tiny.yaml."""

    root: Path

    def __call__(self, *arguments: str) -> Result:
        """Run the program here; argparse's own exits (--help) count as results too."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.chdir(self.root), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main(list(arguments))
            except SystemExit as done:
                code = int(done.code or 0)
        return Result(code, out.getvalue(), err.getvalue())

    def fit(self, *arguments: str) -> "Run":
        """A fit that succeeds."""
        result = self("fit", "--recipe", "tiny.yaml", *arguments)
        assert result.code == 0, result.err
        versions = self.root.glob("lightning_logs/tiny/version_*")
        return Run(max(versions, key=lambda folder: int(folder.name.rpartition("_")[2])), result)

    def files(self) -> dict[str, tuple[int, int]]:
        """Everything under the folder, with size and time of change."""
        status = {str(p.relative_to(self.root)): p.stat() for p in self.root.rglob("*")}
        return {name: (s.st_size, 0 if (self.root / name).is_dir() else s.st_mtime_ns) for name, s in status.items()}


@dataclass(frozen=True)
class Run:
    """A finished fit."""

    folder: Path
    result: Result

    def checkpoint(self, step: int = 6) -> Path:
        """File of the checkpoint after `step` optimizer steps."""
        (found,) = self.folder.glob(f"checkpoints/*step={step}.ckpt")
        return found

    def state(self, step: int = 6) -> dict[str, Any]:
        """That checkpoint."""
        loaded: dict[str, Any] = torch.load(self.checkpoint(step), weights_only=True)
        return loaded

    def summary(self) -> dict[str, Any]:
        """summary.json."""
        values: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return values

    def validation(self) -> list[float]:
        """Validation losses, the collapsed model's first."""
        return [point["loss"] for point in self.summary()["validation"]]


def events(folder: Path) -> EventAccumulator:
    """The event file of a run."""
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def scalars(accumulator: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    """(step, value) of each point."""
    return [(point.step, point.value) for point in accumulator.Scalars(tag)]


def write_lines(path: Path, texts: list[Any], column: str = "text") -> None:
    """Documents as JSONL."""
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in texts), encoding="utf-8")


def make_project(root: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Project:
    """Write a project into `root`."""
    root.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    write_lines(root / "train.jsonl", TRAIN)
    write_lines(root / "validation.jsonl", VALIDATION)
    (root / "tiny.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    return Project(root)


@pytest.fixture
def project(
    tmp_path: Path, tiny_llama: Callable[..., LlamaForCausalLM], tiny_tokenizer: PreTrainedTokenizerFast
) -> Project:
    """A project of its own for one test."""
    return make_project(tmp_path / "project", tiny_llama(), tiny_tokenizer)


@pytest.fixture(scope="module")
def shared_project(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Project:
    """A project that the tests of a file share."""
    return make_project(tmp_path_factory.mktemp("project"), tiny_llama(), tiny_tokenizer)


@pytest.fixture(scope="module")
def run(shared_project: Project) -> Run:
    """A fit of six steps, validated and checkpointed every two, all checkpoints kept."""
    return shared_project.fit(*KEEP_ALL)


class Poison(Callback):
    """Makes a weight infinite once `step` optimizer steps are done: before the next batch's loss, or `at_once`."""

    def __init__(self, step: int, at_once: bool = False):
        self.step = step
        self.at_once = at_once

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A later step sees the broken model."""
        if trainer.global_step == self.step and not self.at_once:
            next(pl_module.parameters()).data.fill_(float("inf"))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """The step's own loss was finite."""
        if trainer.global_step == self.step and self.at_once:
            next(pl_module.parameters()).data.fill_(float("inf"))


class TrainingMode(Callback):
    """Fails unless the model trains in training mode; from_pretrained leaves it in eval mode."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Before each batch, so also after a validation."""
        assert all(module.training for module in pl_module.lm.modules())  # type: ignore[operator, union-attr]


class SpoilGradients(Callback):
    """Makes a gradient infinite at the optimizer steps `steps`, counted from 0."""

    def __init__(self, steps: list[int]):
        self.steps = steps

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """After the backward pass."""
        if trainer.global_step in self.steps:
            gradients = (p.grad for p in pl_module.parameters() if p.grad is not None)
            next(gradients).view(-1)[0] = float("inf")


def same_bytes(one: Path, other: Path) -> None:
    """Assert that two folders hold the same files, byte for byte."""
    names = sorted(p.name for p in one.iterdir())
    assert names == sorted(p.name for p in other.iterdir())
    assert [n for n in names if (one / n).read_bytes() != (other / n).read_bytes()] == []


def environment() -> dict[str, str]:
    """For a subprocess that must find the package of this checkout."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
