"""One model in every format, each export proven in its own runtime, and what the proofs found.

    python benchmarks/exports.py --checkpoint CHECKPOINT --name WHAT --formats hf,ctranslate2,onnx
    python benchmarks/exports.py --checkpoint CHECKPOINT --name WHAT --formats gguf:f16,gguf:q8_0 --llama-cpp llama.cpp

CHECKPOINT is whatever `export` takes. A row a format: whether it was proven, the proof in its own words (prompts,
tokens, largest difference of logits, or agreement and divergence), seconds of the whole export, bytes of the folder. A
refused one is kept too, with what was said.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import append_rows, run_or_say

from laco_train.errors import InputError


def exported(checkpoint: str, form: str, llama_cpp: str | None, folder: Path) -> dict[str, Any]:
    """Export in a process of its own, as a user does.

    Args:
        form: a format, or gguf:TYPE.
    """
    kind, _, gguf_type = form.partition(":")
    command = [sys.executable, "-m", "laco_train", "export", "--checkpoint", checkpoint, "--output", str(folder)]
    command += ["--format", kind, *(["--gguf-type", gguf_type, "--llama-cpp", str(llama_cpp)] if gguf_type else [])]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    lines = [line for line in (done.stdout + done.stderr).splitlines() if any(word in line for word in PROOF)]
    return {
        "proven": done.returncode == 0,
        "said": [line.replace(str(folder), folder.name) for line in lines],
        "seconds": seconds,
        "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
    }


PROOF = ("greedy tokens", "top-1 agreement", "logit", "laco_train: ")
"""What the lines that tell of a proof, or of its failure, hold."""


def measure(options: argparse.Namespace) -> None:
    """Export, print and keep."""
    if "gguf" in options.formats and options.llama_cpp is None:
        raise InputError("--llama-cpp", "gguf needs llama.cpp's repository; name its folder")
    for form in options.formats.split(","):
        with tempfile.TemporaryDirectory() as temporary:
            row = exported(options.checkpoint, form, options.llama_cpp, Path(temporary) / "export")
        row = {"case": f"{options.name}, {form}", "model": options.name, "format": form, **row}
        print(row, flush=True)
        append_rows("exports", [row])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--name", required=True, help="what the model is, for the results")
    parser.add_argument("--formats", default="hf,ctranslate2,onnx")
    parser.add_argument("--llama-cpp", help="folder of llama.cpp's repository")
    run_or_say(parser, measure)
