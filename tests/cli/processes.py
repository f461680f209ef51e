"""Fits in processes of their own, to be killed: forked from a server that has imported the program once."""

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from laco_train.cli import main


def start(root: Path, arguments: Sequence[str]) -> BaseProcess:
    """The program with `arguments`, running in `root`; what it prints is in output.txt there."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["laco_train.cli.rounds", "benchmarks.soak"])
    process = context.Process(target=_run, args=(root, arguments))
    process.start()
    return process


def _run(root: Path, arguments: Sequence[str]) -> None:
    os.chdir(root)
    log = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    raise SystemExit(main(arguments))


def until(process: BaseProcess, true: Callable[[], bool]) -> None:
    """Wait for something that a process does."""
    while not true():
        assert process.is_alive(), "it ended too early"
        time.sleep(0.002)


def kill(process: BaseProcess) -> None:
    """SIGKILL."""
    process.kill()
    process.join()
