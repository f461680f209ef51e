"""How the processes of a run end."""

import subprocess
import sys

import pytest

PROGRAM = """
import atexit, sys
from lightning.pytorch.utilities import rank_zero_only
from laco_train.cli.ranks import leave
rank_zero_only.rank = {rank}
atexit.register(print, "farewell")
print("said")
leave(3)
"""


@pytest.mark.parametrize(("rank", "out"), [(0, "said\nfarewell\n"), (1, "said\n")])
def test_other_ranks_leave_without_a_farewell(rank: int, out: str) -> None:
    program = [sys.executable, "-c", PROGRAM.format(rank=rank)]
    result = subprocess.run(program, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (3, out), result.stderr
