"""Fits in processes of their own, to be killed: forked from a server that has imported the program once."""

import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from laco_train.cli import main


@dataclass(frozen=True)
class Moment:
    """Just before a process does something to a file, for the `time`-th time.

    Attributes:
        event: one of Python's audit events: open, os.rename or os.remove.
        path: a pattern of how the path, or the new one, ends.
    """

    event: str
    path: str
    time: int = 1


def start(root: Path, arguments: Sequence[str], end: Moment | None = None) -> BaseProcess:
    """The program with `arguments`, running in `root`, killed at `end`; what it prints is in output.txt there."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["laco_train.cli.rounds", "benchmarks.soak"])
    process = context.Process(target=_run, args=(root, arguments, end))
    process.start()
    return process


def _run(root: Path, arguments: Sequence[str], end: Moment | None) -> None:
    os.chdir(root)
    log = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if end is not None:
        _kill_itself(end)
    raise SystemExit(main(arguments))


def _kill_itself(end: Moment) -> None:
    times = 0

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal times
        if event == end.event:
            paths = [os.fsdecode(one) for one in arguments if isinstance(one, str | bytes | os.PathLike)]
            times += any(re.search(f"(?:{end.path})$", path) for path in paths)
            if times == end.time:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)


def until(process: BaseProcess, true: Callable[[], bool]) -> None:
    """Wait for something that a process does."""
    while not true():
        assert process.is_alive(), "it ended too early"
        time.sleep(0.002)


def kill(process: BaseProcess) -> None:
    """SIGKILL."""
    process.kill()
    process.join()


def ended(process: BaseProcess) -> int | None:
    """Exit code of a process that ends by itself; below 0: minus the signal that killed it."""
    process.join()
    return process.exitcode
