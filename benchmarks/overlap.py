"""Whether validation text stands in what models are trained, refined or calibrated on.

    python benchmarks/overlap.py --train train.jsonl.gz --validation validation.jsonl.gz

Documents that stand in both, and the share of the validation's stretches of 13 words (as GPT-3's authors looked for
benchmarks in their training text, arXiv 2005.14165, appendix C) that occur in the other text. Refinement reads the
training text. Boilerplate, such as licences and headings that manuals repeat, is counted as text.
"""

import argparse
import gzip
import json
from collections.abc import Iterator
from pathlib import Path

from common import run_or_say, write_results

from laco_train.collapse.similarity import read_calibration

WORDS = 13


def documents(file: Path) -> Iterator[str]:
    """Texts of a .jsonl.gz."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["text"]


def stretches(text: str) -> set[tuple[str, ...]]:
    """All of `WORDS` words in a row, in lower case."""
    words = text.lower().split()
    return {tuple(words[start : start + WORDS]) for start in range(len(words) - WORDS + 1)}


def count(options: argparse.Namespace) -> None:
    """Count, print and keep."""
    held_out = list(documents(options.validation))
    whole, wanted = set(held_out), set().union(*map(stretches, held_out))
    rows = []
    for name, texts in (
        ("train", documents(options.train)),
        ("calibration", iter(read_calibration(options.calibration))),
    ):
        documents_found, found = 0, set[tuple[str, ...]]()
        for text in texts:
            documents_found += text in whole
            found |= stretches(text) & wanted
        rows.append(
            {
                "text": name,
                "validation_documents": len(held_out),
                "documents_in_both": documents_found,
                "validation_stretches": len(wanted),
                "stretches_in_both": len(found),
                "share": len(found) / len(wanted),
                "examples": [" ".join(words) for words in sorted(found)[:3]],
            }
        )
    print(write_results("overlap", rows), rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--calibration", default="calibration_en.txt", help="as collapse.calibration")
    run_or_say(parser, count)
