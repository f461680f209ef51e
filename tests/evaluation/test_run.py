"""What stands before any model is measured: the text."""

import json
from pathlib import Path
from typing import Any

import pytest

from laco_train.errors import InputError
from laco_train.evaluation.run import read_text


def rows(file: Path, *found: dict[str, Any]) -> list[str]:
    file.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return [str(file)]


def test_text_is_taken_as_in_training(tmp_path: Path) -> None:
    """Rows without text are none; whitespace of the others is theirs."""
    found = rows(tmp_path / "a.jsonl", *({"text": text} for text in ("One. ", None, "", " \n", "None")))
    assert read_text([*found, *rows(tmp_path / "b.jsonl", {"text": "Last"})]) == "One. \n\nNone\n\nLast"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": 3}, "line 2 holds int, not text; its column text must hold text"),
        ({"text": ["a"]}, "line 2 holds list, not text"),
        ({"content": "a"}, "line 2 has no column 'text'; it has: content"),
    ],
)
def test_what_is_no_text_is_refused_by_the_option(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=r"^--perplexity: .*a\.jsonl, ") as error:
        read_text(rows(tmp_path / "a.jsonl", {"text": "One"}, row))
    assert words in str(error.value)
