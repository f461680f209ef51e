"""Out of memory: one line that says where, how much, what is kept and what to try next."""

import re
from typing import Any, Literal

import pytest
import torch
from lightning.pytorch import Callback

from laco_train.settings import DataSettings, ModelSettings, OptimizerSettings, SpeedSettings
from laco_train.training.memory import Phase, Situation, advice, asked_for, is_out_of_memory
from tests.cli.runs import Project

CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.18 GiB of which 1.20 GiB is free."
)
CPU = (
    "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 4398046511104 bytes. Error code 12 (Cannot allocate memory)"
)
AS_IT_IS = "data.batch_size 1, data.block_size 128, speed.checkpointing all"


def situation(
    phase: Phase = "step",
    batch: int = 1,
    block: int = 128,
    checkpointing: Literal["auto", "none", "all"] = "all",
    eight_bit: bool = False,
    method: Literal["full", "lora", "last_layers"] = "full",
    **others: Any,
) -> Situation:
    return Situation(
        phase,
        ModelSettings("m", method=method, optimizer=OptimizerSettings(eight_bit=eight_bit)),
        DataSettings(batch_size=batch, block_size=block),
        SpeedSettings(checkpointing=checkpointing),
        **others,
    )


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (
            situation(batch=4, block=1024, checkpointing="auto", accumulate=2),
            "data.batch_size 4 -> 2 with trainer.accumulate_grad_batches 2 -> 4 (same tokens per optimizer step), "
            "data.block_size 1024, speed.checkpointing auto",
        ),
        (
            situation(batch=3),
            "data.batch_size 3 -> 1 with trainer.accumulate_grad_batches 1 -> 3 (same tokens per optimizer step), "
            "data.block_size 128, speed.checkpointing all",
        ),
        (
            situation(block=1024, checkpointing="auto"),
            "data.batch_size 1, data.block_size 1024, speed.checkpointing auto -> all",
        ),
        (situation(block=1024), "data.batch_size 1, data.block_size 1024 -> 512, speed.checkpointing all"),
        (situation(), f"model.optimizer.eight_bit true; with {AS_IT_IS}"),
        (situation(gpu=False), f"model.method lora; with {AS_IT_IS}"),
        (situation(eight_bit=True), f"model.method lora; with {AS_IT_IS}"),
        (situation(eight_bit=True, method="lora"), f"a smaller model, or a device with more memory; with {AS_IT_IS}"),
        # the batch has no part in the optimizer's memory, nor where that leaves nothing
        (situation("optimizer", eight_bit=True), f"model.method lora; with {AS_IT_IS}"),
        (
            situation("optimizer", batch=4),
            "model.optimizer.eight_bit true; with data.batch_size 4, data.block_size 128, speed.checkpointing all",
        ),
        (
            situation(batch=4, free_gib=-1.5),
            "model.optimizer.eight_bit true; with data.batch_size 4, data.block_size 128, speed.checkpointing all",
        ),
        (
            situation(batch=4, free_gib=1.5),
            "data.batch_size 4 -> 2 with trainer.accumulate_grad_batches 1 -> 2 (same tokens per optimizer step), "
            "data.block_size 128, speed.checkpointing all",
        ),
        # nothing is recomputed where there is no backward pass
        (
            situation("validation", block=256, checkpointing="none"),
            "data.batch_size 1, data.block_size 256 -> 128, speed.checkpointing none",
        ),
        (situation("before", searched=True), f"collapse.placement stream; with {AS_IT_IS}"),
        (
            situation("before", searched=True, gpu=False),
            f"a smaller model, or a device with more memory; with {AS_IT_IS}",
        ),
        (situation("before", batch=2), "data.batch_size 2 -> 1, data.block_size 128, speed.checkpointing all"),
        (situation("export"), f"the verb export on the last checkpoint, in a process of its own; with {AS_IT_IS}"),
    ],
)
def test_advice(now: Situation, said: str) -> None:
    assert advice(now) == said


@pytest.mark.parametrize(
    ("error", "seen", "asked"),
    [
        (torch.OutOfMemoryError(CUDA), True, "2.00 GiB"),
        (RuntimeError(CPU), True, "4096.00 GiB"),
        (torch.OutOfMemoryError("out of memory"), True, ""),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False, ""),
        (ValueError(CPU), False, "4096.00 GiB"),
    ],
)
def test_errors_that_are_about_memory(error: Exception, seen: bool, asked: str) -> None:
    assert (is_out_of_memory(error), asked_for(error)) == (seen, asked)


def test_error_of_the_cpu_allocator_is_seen() -> None:
    with pytest.raises(RuntimeError) as found:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(found.value)


class Exhaust(Callback):
    """Raises `error` in the hook `hook`, or in the optimizer, once `step` optimizer steps are done."""

    def __init__(self, hook: str, step: int = 0, error: str = "cuda"):
        def fail(trainer: Any, *_: Any, **__: Any) -> None:
            if trainer.global_step >= step:
                raise {"cuda": torch.OutOfMemoryError(CUDA), "cpu": RuntimeError(CPU), "other": RuntimeError("x")}[
                    error
                ]

        def prepare(trainer: Any, *_: Any) -> None:
            trainer.optimizers[0].register_step_post_hook(lambda *_: fail(trainer))

        if hook == "optimizer":
            self.on_train_start = prepare  # type: ignore[method-assign]
        else:
            setattr(self, hook, fail)


def exhaust(project: Project, hook: str, *options: str, error: str = "cuda") -> tuple[int, str]:
    """Exit code and last line of a fit that fails in `hook` after two steps."""
    callback = f"--trainer.callbacks={Exhaust.__module__}.Exhaust"
    step = "0" if hook == "setup" else "2"
    given = [callback, f"--trainer.callbacks.hook={hook}", f"--trainer.callbacks.step={step}"]
    result = project("fit", "--recipe", "tiny.yaml", *given, f"--trainer.callbacks.error={error}", *options)
    lines = [line for line in result.err.splitlines() if line.startswith("laco_train: ")]
    return result.code, " ".join(lines)


NEXT = (
    "data.batch_size 2 -> 1 with trainer.accumulate_grad_batches 1 -> 2 (same tokens per optimizer step), "
    "data.block_size 32, speed.checkpointing auto"
)


@pytest.mark.parametrize(
    ("hook", "where", "then"),
    [
        ("on_train_batch_start", "in a training step", NEXT),
        ("optimizer", "in the optimizer's step", "model.method lora; with data.batch_size 2"),
        ("on_validation_batch_start", "in validation", NEXT),
        ("setup", "before training", "data.batch_size 2 -> 1, data.block_size 32"),
    ],
)
def test_run_ends_in_one_line(project: Project, hook: str, where: str, then: str) -> None:
    before = project.files()
    code, line = exhaust(project, hook)
    assert code == 1
    number = r"\d+\.\d"
    assert re.match(
        rf"laco_train: stopped: out of memory {where}[^:]*: 2\.00 GiB more was asked for, "
        rf"the peak was {number} of {number} GiB; last good checkpoint: ",
        line,
    ), line
    assert f"; try next: {then}" in line
    if hook == "setup":
        assert project.files().keys() == before.keys()  # the run never began


def test_last_good_checkpoint_is_named(project: Project) -> None:
    _, line = exhaust(project, "on_train_batch_start")
    (written,) = project.root.glob("lightning_logs/tiny/version_0/checkpoints/*step=2.ckpt")
    assert f"last good checkpoint: {written.relative_to(project.root)};" in line
    _, line = exhaust(project, "on_train_batch_start", "--trainer.val_check_interval=3")
    assert "last good checkpoint: none was saved yet;" in line


def test_cpu_is_told_alike(project: Project) -> None:
    code, line = exhaust(project, "on_train_batch_start", error="cpu")
    assert code == 1
    assert "4096.00 GiB more was asked for" in line


def test_other_errors_keep_their_traceback(project: Project) -> None:
    with pytest.raises(RuntimeError, match=r"^x$"):
        exhaust(project, "on_train_batch_start", error="other")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_error_of_a_gpu_is_seen() -> None:
    with pytest.raises(torch.OutOfMemoryError) as found:
        torch.empty(1 << 45, dtype=torch.uint8, device="cuda")
    assert is_out_of_memory(found.value)
    assert asked_for(found.value) == "32768.00 GiB"
