"""Runs `bench-inference` and keeps what it found as results.

    python benchmarks/inference.py NAME -- original=MODEL best=DIR --batch-sizes 1,4

Everything after -- goes to `python -m laco_train bench-inference`, whose models take turns in one process. One row
with the figures of all.
"""

import sys

from common import measured_by, write_results

if __name__ == "__main__":
    name, dashes, *arguments = sys.argv[1:]
    assert dashes == "--", __doc__
    found = measured_by("bench-inference", arguments, "inference.json")
    print(write_results(name, [found]))
