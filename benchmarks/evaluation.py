"""Runs `evaluate` and keeps what it found as results.

    python benchmarks/evaluation.py NAME -- --baseline original=MODEL --model laco=DIR sleb=DIR --tasks all

Everything after -- goes to `python -m laco_train evaluate`, which writes to a folder of its own here. A row a model.
"""

import sys

from common import measured_by, write_results

if __name__ == "__main__":
    name, dashes, *arguments = sys.argv[1:]
    assert dashes == "--", __doc__
    found = measured_by("evaluate", arguments, "evaluation/evaluation.json")
    print(write_results(name, found["models"]))
