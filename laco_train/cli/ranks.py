"""How several processes end: one line from rank 0, no traceback from the others, and nobody left waiting."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_only

from laco_train.errors import InputError, TrainingStopped
from laco_train.training.parallel import ToldByRankZero

# Rank 0 needs less to find the same fault and end the others, which must not end first: Lightning kills rank 0 then.
_PATIENCE_SECONDS = 10.0


@contextmanager
def ending_children(trainer: Trainer) -> Iterator[None]:
    """Kill the processes that Lightning started here, should this one fail: they would report a lost connection.

    Raises:
        KeyboardInterrupt: as the block does; Lightning makes an exit code of its own of it.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
            trainer.strategy.launcher.kill(signal.SIGKILL)
            trainer.strategy.launcher.procs.clear()  # else Lightning would find them dead, and kill this process too
        if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise


@contextmanager
def rank_zero_speaks_first() -> Iterator[None]:
    """Hold back what another rank than 0 has to say, so that a fault of all ranks is told once."""
    try:
        yield
    except (InputError, TrainingStopped, ToldByRankZero):
        if getattr(rank_zero_only, "rank", None):
            time.sleep(_PATIENCE_SECONDS)
        raise


def leave(code: int) -> NoReturn:
    """End the process; another rank than 0 without Python's and C++'s farewells, in which torch's threads may abort.

    Seen once, in some hundred runs on gloo: the work was done, and torchrun took the run for failed.
    """
    if getattr(rank_zero_only, "rank", None):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def part_ranks() -> None:
    """Every rank goes its own way from here: what rank 0 writes needs no answer from the others."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
