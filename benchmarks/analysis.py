"""Runs `analyze` and keeps what it found as results: are neighbouring layers alike, which are missed, what C and T do.

    python benchmarks/analysis.py NAME -- --recipe smollm2_135m_collapse.yaml --sweep true

Everything after -- goes to `python -m laco_train analyze`.
"""

import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

from common import write_results


def neighbours(table: Path) -> dict[str, dict[str, float]]:
    """Of each kind of parameter mean, smallest and largest cosine between a layer and the next."""
    found: dict[str, list[float]] = {}
    with table.open(encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            if int(row["layer_b"]) == int(row["layer_a"]) + 1:
                found.setdefault(row["module"], []).append(float(row["cosine"]))
    return {name: {"mean": fmean(v), "smallest": min(v), "largest": max(v)} for name, v in found.items()}


def main(name: str, arguments: list[str]) -> None:
    """Run it and keep the numbers."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "analysis"
        command = [sys.executable, "-m", "laco_train", "analyze", *arguments, "--output", str(folder)]
        subprocess.run(command, check=True)
        found: dict[str, Any] = json.loads((folder / "analysis.json").read_text(encoding="utf-8"))
        states = found.pop("state_cosines")
        found["neighbouring_states"] = [states[k][k + 1] for k in range(len(states) - 1)]
        found["neighbouring_parameters"] = neighbours(folder / "parameters.csv")
    print(write_results(name, [found]))


if __name__ == "__main__":
    chosen, dashes, *rest = sys.argv[1:]
    assert dashes == "--", __doc__
    main(chosen, rest)
