"""What every benchmark writes: results with the machine, the versions, the commit, the command and the date."""

import json
import os
import platform
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from laco_train.errors import InputError

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "transformers", "lightning", "peft", "datasets")


def measured_by(verb: str, arguments: list[str], output: str) -> dict[str, Any]:
    """What `verb` of the program writes: the JSON file `output`, in the folder it gets as --output, if it has one.

    Args:
        output: such as ``inference.json``, or ``evaluation/evaluation.json``.
    """
    with tempfile.TemporaryDirectory() as temporary:
        asked = Path(temporary) / Path(output).parts[0]
        command = [sys.executable, "-m", "laco_train", verb, *arguments, "--output", str(asked)]
        subprocess.run(command, check=True)
        found: dict[str, Any] = json.loads((Path(temporary) / output).read_text(encoding="utf-8"))
    return found


def run_or_say(parser: ArgumentParser, run: Callable[[Namespace], None]) -> None:
    """`run` with the command line; what is wrong with it is one line and exit code 2. Results name files, not paths."""
    options = parser.parse_args()
    name_files()
    try:
        run(options)
    except InputError as error:
        parser.exit(2, f"{error}\n")


def name_files() -> None:
    """Leave the folders of files and folders on the command line, which is parsed, out of what results say of it."""
    parts = [word.rpartition("=") for word in sys.argv[1:]]  # of --key=PATH too
    sys.argv[1:] = [key + sign + (Path(value).name if Path(value).exists() else value) for key, sign, value in parts]


def machine() -> str:
    """The card, or the processor and its cores."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} ({torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB)"
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"


def commit() -> str:
    """The commit measured; from LACO_COMMIT where the code runs outside a checkout."""
    if "LACO_COMMIT" in os.environ:
        return os.environ["LACO_COMMIT"]
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def header() -> dict[str, Any]:
    """Where, with what, of which commit, by which command and when."""
    return {
        "machine": machine(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        "commit": commit(),
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def append_rows(name: str, rows: list[dict[str, Any]], folder: Path = RESULTS) -> Path:
    """Add `rows`, with a header where they have none of their own, to NAME.json, in place of earlier ones of a case."""
    path = folder / f"{name}.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {**header(), "rows": []}
    cases = {row["case"] for row in rows}
    kept = [row for row in found["rows"] if row["case"] not in cases]
    found["rows"] = [*kept, *({**header(), **row} for row in rows)]
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return path


def write_results(name: str, rows: Any, folder: Path = RESULTS) -> Path:
    """Write `rows` under their header as NAME.json; returns the path."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**header(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return path
