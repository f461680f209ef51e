"""Where training text comes from: files or hub data sets, always read as a stream, one document at a time."""

import glob
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from laco_train.errors import InputError
from laco_train.files import home
from laco_train.recipes import find, shipped

DOCUMENT_CHARACTERS = 100_000
"""Most characters of a document cut from a .txt file."""
_FEWEST_CHARACTERS = 5_000  # some 1,250 English tokens, more than a block has by default
_DOCUMENTS = 200  # of which a share of 0.02 catches one 98 times in 100

_SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".json.gz", ".parquet")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True)
class Row:
    """One document as found.

    Attributes:
        value: the text, or for chat the list of messages.
        where: file and line, for error messages.
    """

    value: Any
    where: str


@dataclass(frozen=True)
class TextFile:
    """A local file; `key` is the recipe key that named it.

    Attributes:
        characters: most of a document, where a .txt file is cut into documents.
    """

    key: str
    path: Path
    characters: int = DOCUMENT_CHARACTERS

    def identity(self) -> list[Any]:
        """Changes whenever the documents do: path, size and time of change of the file, and how it is cut."""
        stat = self.path.stat()
        cut = [] if self.characters == DOCUMENT_CHARACTERS else [self.characters]
        return [str(self.path.resolve()), stat.st_size, stat.st_mtime_ns, *cut]

    def rows(self, column: str) -> Iterator[Row]:
        """Documents of the file; `column` is not used for .txt.

        Raises:
            InputError: unreadable or broken file (with the line), or no such column.
        """
        name = str(self.path)
        try:
            if name.endswith(".parquet"):
                yield from self._parquet(column)
            elif name.endswith(".txt"):
                with self.path.open(encoding="utf-8") as file:
                    for i, text in enumerate(cut_text(file, self.characters), start=1):
                        yield Row(text, f"{name}, document {i}")
            else:
                with (gzip.open if name.endswith(".gz") else open)(self.path, "rt", encoding="utf-8") as file:
                    yield from self._json_lines(file, column)
        except (OSError, EOFError, zlib.error, UnicodeDecodeError, pa.ArrowException) as error:
            raise InputError(self.key, f"{name} can't be read ({error}); mend or replace the file") from error

    def _json_lines(self, lines: Iterable[str], column: str) -> Iterator[Row]:
        for i, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{self.path}, line {i}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # not JSON, 4,300 digits in a row, or thousands of brackets
                raise InputError(self.key, f"{where} is not JSON ({error}); write one object a line") from error
            if "\\ud" in line.lower():  # half a surrogate pair is legal JSON, but no text: it becomes a question mark
                row = json.loads(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace"))
            if not isinstance(row, dict):
                raise InputError(self.key, f"{where} is not a JSON object; write one object a line")
            yield Row(_pick(row, column, where), where)

    def _parquet(self, column: str) -> Iterator[Row]:
        with pq.ParquetFile(self.path) as file:
            _pick(dict.fromkeys(file.schema_arrow.names), column, str(self.path))
            i = 0
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                for value in batch.column(column).to_pylist():
                    i += 1
                    yield Row(value, f"{self.path}, row {i}")


@dataclass(frozen=True)
class HubSet:
    """A data set of the hub, split train, streamed; `key` is the recipe key that named it."""

    key: str
    name: str
    config: str | None

    def identity(self) -> list[Any]:
        """Name and configuration: a packed hub set is kept until its cache is deleted, so that it works offline."""
        return ["hub", self.name, self.config]

    def rows(self, column: str) -> Iterator[Row]:
        """Documents of the set.

        Raises:
            InputError: the hub can't be reached, has no such set or configuration, the set has no such column, or its
                stream breaks off.
        """
        try:
            stream = datasets.load_dataset(self.name, self.config, split="train", streaming=True)
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: it is a script, which is never run
            spelled = f"{self.name}:{self.config}" if self.config else self.name
            raise InputError(
                self.key,
                f"{spelled!r} is no file here, and the hub gave no such data set ({error}); "
                "name a file, or check the name, the connection and HF_TOKEN",
            ) from error
        i = 0
        try:
            for i, row in enumerate(stream, start=1):
                where = f"{self.name}, row {i}"
                yield Row(_pick(row, column, where), where)
        except InputError:
            raise
        except Exception as error:  # what connections and readers of all formats raise has no end
            problem = f"{self.name} broke off after row {i} ({error}); try again, or name a file"
            raise InputError(self.key, problem) from error


Source = TextFile | HubSet


def resolve(key: str, names: str | list[str]) -> list[Source]:
    """Files and hub sets that `names` stands for, in order.

    A name is a file or a glob (as given, under ./data, or shipped with the package), or NAME or NAME:CONFIG of the hub.

    Raises:
        InputError: at `key`, for a missing file, a folder, an unknown kind of file, or a glob that matches nothing.
    """
    return [source for name in ([names] if isinstance(names, str) else names) for source in _resolve_one(key, name)]


def _resolve_one(key: str, name: str) -> list[Source]:
    found = [p] if (p := find("data", name)) else _matches(name)
    for path in found:
        if not path.name.endswith(_SUFFIXES):
            raise InputError(key, f"{path} is none of {', '.join(_SUFFIXES)}; convert it to one of them")
    if found:
        return [TextFile(key, path) for path in found]
    if os.path.isdir(home(name)):
        raise InputError(key, f"{name!r} is a folder; name its files, such as '{name.rstrip('/')}/*.jsonl'")
    if name.endswith(_SUFFIXES) or not _HUB_NAME.fullmatch(name):
        raise InputError(key, f"no file matches {name!r}, neither here, nor under ./data, nor shipped; check the path")
    hub_name, _, config = name.partition(":")
    return [HubSet(key, hub_name, config or None)]


def _matches(pattern: str) -> list[Path]:
    """Files that a glob matches in the first place that has any, sorted."""
    if not glob.has_magic(pattern):
        return []
    for place in (home(pattern), Path("data") / pattern, shipped("data") / pattern):
        files = sorted(p for p in map(Path, glob.glob(str(place), recursive=True)) if p.is_file())
        if files:
            return files
    return []


def cut_finely(sources: list[Source]) -> list[Source]:
    """The same; .txt files that are all there is, and little, are cut into shorter documents, so that a share of them
    can be held out: 200, unless they would have fewer than 5,000 characters.
    """
    files = [source for source in sources if isinstance(source, TextFile) and source.path.name.endswith(".txt")]
    if len(files) < len(sources):
        return sources
    size = sum(file.path.stat().st_size for file in files)  # bytes, so a little more than characters
    characters = min(max(size // _DOCUMENTS, _FEWEST_CHARACTERS), DOCUMENT_CHARACTERS)
    return [replace(file, characters=characters) for file in files]


def cut_text(file: TextIO, limit: int) -> Iterator[str]:
    """Documents of at most `limit` characters from a plain text file.

    A .txt file has no marks between documents, so it is cut at paragraph boundaries (an empty line), each document as
    long as `limit` allows; a single large file can thus be divided into training and validation. A longer paragraph is
    cut at a line end, else at a space, else anywhere. Newlines around a cut are dropped.
    """
    rest = ""
    while chunk := file.read(limit):
        rest += chunk
        while len(rest) > limit:
            cuts = (rest.rfind(mark, 1, limit + len(mark)) for mark in ("\n\n", "\n", " "))
            cut = next((c for c in cuts if c > 0), limit)
            yield rest[:cut].strip("\n")
            rest = rest[cut:].lstrip("\n")
    yield rest.strip("\n")


def _pick(row: Mapping[str, Any], column: str, where: str) -> Any:
    if column not in row:
        raise InputError("data.column", f"{where} has no column {column!r}; it has: {', '.join(map(str, row))}")
    return row[column]
