"""Fits killed by SIGKILL at random moments and resumed end like unbroken ones, bit for bit; see benchmarks/soak.py."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.cli.runs import environment

KILLS = 9


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Three kills of each configuration; the moments are in the output of a failed test."""
    folder = tmp_path_factory.mktemp("soak")
    command = [sys.executable, "-m", "benchmarks.soak", "--kills", str(KILLS), "--output", str(folder)]
    done = subprocess.run(command, env={**environment(), "TMPDIR": str(folder)}, capture_output=True, text=True)
    assert (folder / "soak.json").is_file(), done.stdout + done.stderr
    print(done.stdout)
    found: list[dict[str, Any]] = json.loads((folder / "soak.json").read_text())["rows"]
    return found


@pytest.mark.parametrize("configuration", ["0 workers", "2 workers", "2 DDP ranks"])
def test_killed_runs_end_like_unbroken_ones(rows: list[dict[str, Any]], configuration: str) -> None:
    (row,) = (row for row in rows if row["configuration"] == configuration)
    assert row["kills"] == row["resumes"] == KILLS // 3
    different = [name for name in ("weights", "order", "losses", "files") if not row[f"equal_{name}"]]
    assert different == [], f"killed after {row['moments']} seconds"
