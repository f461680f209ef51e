"""What the harness writes in Python for two tasks, hellaswag and winogrande.

In lm-eval 0.4.13: hellaswag/utils.py, winogrande/preprocess_winogrande.py. A test compares the prompts.
"""

import re
from typing import Any

from datasets import Dataset


def hellaswag(docs: Dataset) -> Dataset:
    """Adds query, choices and gold."""

    def worded(doc: dict[str, Any]) -> dict[str, Any]:
        context = f"{doc['ctx_a']} {doc['ctx_b'].capitalize()}"
        return {
            "query": _without_brackets(f"{doc['activity_label']}: {context}"),
            "choices": [_without_brackets(ending) for ending in doc["endings"]],
            "gold": int(doc["label"]),
        }

    return docs.map(worded)


def _without_brackets(text: str) -> str:
    """WikiHow leaves marks such as [title] and [step]."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def winogrande_text(doc: dict[str, Any]) -> int:
    """Index of the right option: the options are contexts, the continuation is the same."""
    return int(doc["answer"]) - 1


def winogrande_target(doc: dict[str, Any]) -> str:
    """What follows the blank."""
    return str(doc["sentence"].partition("_")[2].strip())


def winogrande_choices(doc: dict[str, Any]) -> list[str]:
    """What comes before the blank, with each option in it."""
    before = doc["sentence"].partition("_")[0]
    return [before + doc["option1"], before + doc["option2"]]
