"""Runs `evaluate` and keeps what it found as results.

    python benchmarks/evaluation.py NAME -- --baseline original=MODEL --model laco=DIR sleb=DIR --tasks all

Everything after -- goes to `python -m laco_train evaluate`, which writes to a folder of its own here. A row a model.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import write_results

if __name__ == "__main__":
    name, dashes, *arguments = sys.argv[1:]
    assert dashes == "--", __doc__
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary) / "evaluation"
        command = [sys.executable, "-m", "laco_train", "evaluate", *arguments, "--output", str(output)]
        subprocess.run(command, check=True)
        found = json.loads((output / "evaluation.json").read_text(encoding="utf-8"))
    print(write_results(name, found["models"]))
