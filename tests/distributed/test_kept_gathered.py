"""Layers that stay whole from the forward to the backward pass, on two processes: the same, with fewer gathers."""

from pathlib import Path

from torch import multiprocessing

from tests.distributed.gathered_rank import on_a_rank


def test_losses_and_weights_stay(tmp_path: Path) -> None:
    multiprocessing.spawn(on_a_rank, (str(tmp_path / "meeting"),), nprocs=2)
