"""Runs `bench-inference` and keeps what it found as results.

    python benchmarks/inference.py NAME -- original=MODEL best=DIR --batch-sizes 1,4

Everything after -- goes to `python -m laco_train bench-inference`, whose models take turns in one process. A row a
model and batch size.
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
        output = Path(temporary) / "inference.json"
        command = [sys.executable, "-m", "laco_train", "bench-inference", *arguments, "--output", str(output)]
        subprocess.run(command, check=True)
        found = json.loads(output.read_text(encoding="utf-8"))
    print(write_results(name, [found]))
