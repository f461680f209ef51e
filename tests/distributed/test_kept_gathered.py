"""Layers that stay whole from the forward to the backward pass, on two processes: the same, with fewer gathers."""

from pathlib import Path

import torch
from torch import multiprocessing

from laco_train.training.parallel import types_of
from tests.distributed.gathered_rank import on_a_rank


def test_types_that_are_gathered_and_summed() -> None:
    own, mixed = types_of("bf16-true"), types_of("bf16-mixed")
    assert (own.param_dtype, own.reduce_dtype) == (None, None)
    assert (mixed.param_dtype, mixed.reduce_dtype) == (torch.bfloat16, torch.float32)


def test_losses_and_weights_stay(tmp_path: Path) -> None:
    multiprocessing.spawn(on_a_rank, (str(tmp_path / "meeting"),), nprocs=2)
