"""A fit in a process of its own: its memory is free again at its end, and its crash is that of one run."""

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from laco_train.callbacks.preemption import SIGNALS

Fit = Callable[[list[str], Path], int]
"""Runs fit with command-line arguments, its output added to a file; returns the exit code."""


def fit_process(arguments: list[str], log: Path) -> int:
    """Run fit.

    Raises:
        SystemExit: told to go by a signal, which fit was told too, and has obeyed.
    """
    command = [sys.executable, "-m", "laco_train", "fit", *arguments]
    with log.open("a", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        with _passing_on(process) as received:
            code = process.wait()
    if received:
        print(f"{signal.Signals(received[0]).name}: stopped; the same command goes on with it.", flush=True)
        raise SystemExit(128 + received[0])
    return code


@contextmanager
def _passing_on(process: "subprocess.Popen[bytes]") -> Iterator[list[int]]:
    """Signals that fit ends at go to `process`; gives a list of those that came. It never outlives the block.

    A second SIGINT is what it was before the block.
    """
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(number, before[signal.SIGINT])
            number = signal.SIGTERM  # the keyboard's has reached fit too, which a second one would end at once
        process.send_signal(number)

    for number in SIGNALS:
        if number != signal.SIGINT or before[number] != signal.SIG_IGN:  # ignored by what a script leaves behind
            signal.signal(number, pass_on)
    try:
        yield received
    finally:
        if process.poll() is None:  # an interrupt from the keyboard has reached it too
            process.terminate()
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def last_words(log: Path, begin: int) -> str:
    """The line with which a fit ended, whose output begins at byte `begin` of `log`, after that of earlier tries."""
    output = log.read_bytes()[begin:].decode("utf-8", errors="replace")
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("laco_train: ")]
    return (said or lines or ["it said nothing"])[-1].removeprefix("laco_train: ")
