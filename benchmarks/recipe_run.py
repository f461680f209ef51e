"""Runs a recipe and keeps what it reached as results.

    python benchmarks/recipe_run.py NAME -- --recipe smollm2_135m_collapse.yaml --data.train 'texts/*.jsonl.gz'

Everything after -- goes to `python -m laco_train fit`. The row is the run's own summary.json, with the loss of the
original, which is the alternative that it is measured against, on the same validation blocks.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

from common import write_results

if __name__ == "__main__":
    name, dashes, *arguments = sys.argv[1:]
    assert dashes == "--", __doc__
    command = [sys.executable, "-m", "laco_train", "fit", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    folder = None
    for line in process.stdout:
        print(line, end="", flush=True)
        found = re.match(r"Run: (\S+)", line)
        folder = Path(found.group(1)) if found else folder
    if process.wait() != 0 or folder is None:
        sys.exit(process.returncode or 1)
    print(write_results(name, [json.loads((folder / "summary.json").read_text(encoding="utf-8"))]))
