"""The two ways a run ends early on purpose; both are printed as one line, without a traceback."""

_LONGEST = 900
"""Characters of a line that a reader still reads."""


class InputError(ValueError):
    """Bad input from the user: ends the program with exit code 2.

    Args:
        key: the recipe key or command-line option at fault, such as ``collapse.layers_per_merge``.
        problem: what is wrong and how to mend it, in one line.
    """

    def __init__(self, key: str, problem: str):
        super().__init__(_shortened(f"{key}: {' '.join(problem.split())}"))
        self.key = key


def _shortened(line: str) -> str:
    """`line`, its middle left out where it quotes a lot: the key comes first, and the fix last."""
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 3 :]}"


class TrainingStopped(RuntimeError):
    """Training can't go on (a non-finite loss, a proof that failed): exit code 1."""
