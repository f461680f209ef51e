"""The estimate that a CPU run begins with."""

import re

import pytest
import torch

from laco_train.callbacks.duration import as_duration
from laco_train.training.matmul import matmul_rate
from tests.cli.runs import Project, Run


def test_estimate_counts_steps_and_tokens(run: Run) -> None:
    (line,) = [line for line in run.result.out.splitlines() if line.startswith("Training: ")]
    assert re.fullmatch(r"Training: 6 steps, 384 tokens, about \d+ seconds on this CPU\.", line)


def test_a_resumed_run_is_told_what_is_left(shared_project: Project, run: Run) -> None:
    again = shared_project.fit("--ckpt_path", str(run.checkpoint(4)), "--export.enabled=false")
    (line,) = [line for line in again.result.out.splitlines() if line.startswith("Training: ")]
    assert line.startswith("Training: 2 steps, 128 tokens, ")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "0 seconds"), (89, "89 seconds"), (600, "10 minutes"), (5399, "90 minutes"), (7200, "2.0 hours")],
)
def test_units(seconds: float, words: str) -> None:
    assert as_duration(seconds) == words


def test_rate_is_that_of_a_processor() -> None:
    assert 1e8 < matmul_rate(torch.device("cpu"), size=64) < 1e14
