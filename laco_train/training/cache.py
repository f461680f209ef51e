"""Packs a data set once: the blocks in an Arrow file written and found again by `datasets`, and a summary beside it."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetGenerationError
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from laco_train.errors import InputError, TrainingStopped
from laco_train.files import write_whole
from laco_train.models.gguf import cache_root
from laco_train.training.encode import encode_conversations, encode_texts
from laco_train.training.packing import IGNORED, Block, Encoded, pack_text, pack_whole
from laco_train.training.sources import Row, Source

_TEXT_VERSION, _CHAT_VERSION = 1, 2  # raise one when the same request would give other blocks
_SUMMARY = "summary.json"
_GROUP_DOCUMENTS, _GROUP_CHARACTERS = 256, 1_000_000  # tokenised in one call


@dataclass(frozen=True)
class Selection:
    """Which documents of a source to take, by the sha256 of their text, so that equal documents go the same way.

    Attributes:
        fraction: share of documents that is held out; None: nothing is.
        held_out: take the held-out documents, not the others.
        excluded: hex digests of documents never to take.
        swept: share of documents that is left out of training and validation, at the other end of the hash.
        sweeps: take those instead.
    """

    fraction: float | None = None
    held_out: bool = False
    excluded: frozenset[str] = frozenset()
    swept: float = 0.0
    sweeps: bool = False

    def takes(self, digest: str) -> bool:
        """Whether the document with this digest is taken."""
        place = int(digest[:16], 16)
        if self.fraction is not None and (place < self.fraction * 2**64) != self.held_out:
            return False
        if not self.held_out and (place >= (1 - self.swept) * 2**64) != self.sweeps:
            return False
        return digest not in self.excluded


@dataclass(frozen=True)
class Request:
    """What to pack: everything that decides what the blocks hold, but the tokenizer.

    Attributes:
        key: recipe key to blame, ``data.train`` or ``data.validation``.
        sources: where documents come from, in order.
        column: column of the text or messages.
        chat: conversations, not text.
        block_size: tokens in a block.
        max_tokens: stop reading when the blocks hold this many; None: read all.
        selection: which documents to take.
    """

    key: str
    sources: list[Source]
    column: str
    chat: bool
    block_size: int
    max_tokens: int | None
    selection: Selection


@dataclass
class Summary:
    """What a packed set holds.

    Attributes:
        documents: documents or conversations that begin in a block.
        tokens: tokens in the blocks, without padding.
        blocks: number of blocks.
        duplicates: documents left out because validation holds the same text.
        skipped: conversations left out because no assistant's turn begins inside a block.
        sha256: over the three columns of all blocks, in order.
        digests: sha256 of each document read for it, in order; kept for validation only.
    """

    documents: int = 0
    tokens: int = 0
    blocks: int = 0
    duplicates: int = 0
    skipped: int = 0
    sha256: str = ""
    digests: list[str] = field(default_factory=list)


@dataclass
class _Seen:
    """Counted while reading, to explain an empty result."""

    documents: int = 0
    taken: int = 0
    tokens: int = 0


def open_packed(request: Request, tokenizer: PreTrainedTokenizerBase) -> tuple[datasets.Dataset, Summary]:
    """The packed blocks of `request`, from the cache if an equal one was packed before.

    Processes that want the same wait for the first of them.

    Returns:
        Blocks with columns input_ids, labels and position_ids, int32, (block_size,) each; and their summary.

    Raises:
        InputError: nothing to pack, less than a block, what reading and encoding raise (nothing is kept then), or the
            cache can't be made.
        TrainingStopped: the disk is full.
    """
    name = fingerprint(request, tokenizer)
    folder = cache_root() / "packed" / name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(folder.with_name(f"{name}.lock")).acquire()
    except OSError as error:
        problem = f"can't keep its blocks in {folder} ({error}); set LACO_TRAIN_CACHE to a folder that can be written"
        raise InputError(request.key, problem) from error
    with held:
        try:
            if folder.is_dir() and _summary(folder) is None:
                shutil.rmtree(folder)
            blocks = _packed(request, tokenizer, folder)
        except (OSError, DatasetGenerationError) as error:
            cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
            if isinstance(cause, InputError):
                raise cause from None
            if not isinstance(cause, OSError):
                raise
            problem = f"can't write {folder} ({cause}); make room, or set LACO_TRAIN_CACHE to a folder with room"
            raise TrainingStopped(problem) from error
        summary = _summary(folder)
    assert summary is not None
    return blocks, summary


def _packed(request: Request, tokenizer: PreTrainedTokenizerBase, folder: Path) -> datasets.Dataset:
    column = datasets.Sequence(datasets.Value("int32"), length=request.block_size)
    return datasets.Dataset.from_generator(
        lambda: _examples(request, tokenizer, folder / _SUMMARY),
        features=datasets.Features({"input_ids": column, "labels": column, "position_ids": column}),
        cache_dir=str(folder),
        split=datasets.Split(request.key.removeprefix("data.")),
        fingerprint=folder.name,
    )


def _summary(folder: Path) -> Summary | None:
    """That of a packed set; None if there is none, or none that can be read."""
    try:
        return Summary(**json.loads((folder / _SUMMARY).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def fingerprint(request: Request, tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex name of the packed set: equal if, and only if, the same blocks would come out."""
    selection = request.selection
    parts = {
        "version": _CHAT_VERSION if request.chat else _TEXT_VERSION,
        **{name: getattr(request, name) for name in ("key", "column", "chat", "block_size", "max_tokens")},
        "sources": [source.identity() for source in request.sources],
        "selection": [
            *(selection.fraction, selection.held_out, sorted(selection.excluded)),
            *((selection.swept, selection.sweeps) if selection.swept else ()),
        ],
        "tokenizer": tokenizer_identity(tokenizer, chat=request.chat),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> str:
    """sha256 of what the tokenizer does to text: its backend (or class and vocabulary), EOS and pad; for `chat` the
    template too, and the special tokens, which it may render by name."""
    if tokenizer.is_fast:
        does = json.loads(tokenizer.backend_tokenizer.to_str())
        # Calls leave these two behind; packing uses neither.
        del does["padding"], does["truncation"]
    else:
        does = [type(tokenizer).__qualname__, tokenizer.get_vocab()]
    rendered = [tokenizer.chat_template, tokenizer.special_tokens_map] if chat else None
    parts = [does, tokenizer.eos_token_id, tokenizer.pad_token_id, rendered]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _examples(request: Request, tokenizer: PreTrainedTokenizerBase, summary_file: Path) -> Iterator[dict[str, Any]]:
    """Blocks as rows; the summary is written after the last, so a set that `datasets` has finished always has one."""
    summary, seen, sha = Summary(), _Seen(), hashlib.sha256()
    encoded = _counted(_encoded(request, tokenizer, summary, seen), request, summary, seen)
    blocks: Iterator[Block]
    if request.chat:
        # a pad token that was added to the tokenizer alone has no embedding; any token will do, as none is learned
        blocks = pack_whole(encoded, request.block_size, tokenizer.eos_token_id)
    else:
        blocks = pack_text(encoded, request.block_size)
    limit = None if request.max_tokens is None else request.max_tokens // request.block_size
    for block in islice(blocks, limit):
        row = {"input_ids": block.input_ids, "labels": block.labels, "position_ids": block.position_ids}
        for values in row.values():
            sha.update(values.tobytes())
        summary.documents += block.documents
        summary.tokens += block.filled
        summary.blocks += 1
        yield row
    if not summary.blocks:
        raise _explain(request, tokenizer, summary, seen)
    summary.sha256 = sha.hexdigest()
    write_whole(summary_file, json.dumps(asdict(summary)))


def _counted(documents: Iterable[Encoded], request: Request, summary: Summary, seen: _Seen) -> Iterator[Encoded]:
    for document in documents:
        seen.tokens += len(document.ids)
        if request.key == "data.validation":
            summary.digests.append(document.digest)
        yield document


def _encoded(request: Request, tokenizer: PreTrainedTokenizerBase, summary: Summary, seen: _Seen) -> Iterator[Encoded]:
    for rows, digests in _groups(request, summary, seen):
        if request.chat:
            encoded = encode_conversations(tokenizer, rows, request.block_size)
        else:
            encoded = encode_texts(tokenizer, [row.value for row in rows])
        for (ids, labels), digest in zip(encoded, digests, strict=True):
            if request.chat and not (labels != IGNORED).any():
                summary.skipped += 1
            elif len(ids):
                yield Encoded(ids, labels, digest)


def _groups(request: Request, summary: Summary, seen: _Seen) -> Iterator[tuple[list[Row], list[str]]]:
    """Taken documents in groups for one call of the tokenizer, with their digests."""
    rows: list[Row] = []
    digests: list[str] = []
    size = 0
    for row in (row for source in request.sources for row in source.rows(request.column)):
        text = canonical_text(row, request.chat)
        if not text.strip():
            continue
        seen.documents += 1
        digest = hashlib.sha256(text.encode()).hexdigest()
        if not request.selection.takes(digest):
            summary.duplicates += digest in request.selection.excluded
            continue
        seen.taken += 1
        rows.append(row)
        digests.append(digest)
        size += len(text)
        if len(rows) == _GROUP_DOCUMENTS or size >= _GROUP_CHARACTERS:
            yield rows, digests
            rows, digests, size = [], [], 0
    if rows:
        yield rows, digests


def canonical_text(row: Row, chat: bool) -> str:
    """What makes two documents equal: the text, or the messages as sorted JSON. A null counts as empty."""
    if row.value is None:
        return ""
    if chat:
        return json.dumps(row.value, sort_keys=True, ensure_ascii=False, default=str)
    if not isinstance(row.value, str):
        raise InputError("data.column", f"{row.where} holds {type(row.value).__name__}, not text; name a text column")
    return row.value


def _explain(request: Request, tokenizer: PreTrainedTokenizerBase, summary: Summary, seen: _Seen) -> InputError:
    """Why there is not one block."""
    selection, held = request.selection, f"{seen.documents} documents of data.train"
    if seen.documents == 0:
        key = "data.train" if selection.fraction is not None else request.key
        return InputError(key, "holds no text; name a file or data set that does")
    if selection.sweeps and not (seen.taken and seen.tokens):
        return InputError(
            "data.sweep_fraction",
            f"the share of {selection.swept} caught none of the {held}; raise it",
        )
    if seen.taken == 0 and selection.held_out:
        return InputError(
            "data.validation",
            f"the share of {selection.fraction} held out caught none of the {held}; "
            f"{_more_held_out(request, tokenizer)}",
        )
    if seen.taken == 0 and selection.fraction is not None:
        return InputError(
            "data.validation",
            f"the share of {selection.fraction} held out caught all {held}; name a validation set, or lower "
            "data.validation_fraction",
        )
    if seen.taken == 0:
        return InputError("data.validation", f"holds all of the {held}, so none is left to train on; name other text")
    if summary.skipped:
        return InputError(
            request.key,
            f"none of {summary.skipped} conversations has an assistant's turn in its first {request.block_size} "
            "tokens; raise data.block_size or name other conversations",
        )
    fix = _more_held_out(request, tokenizer) if selection.held_out else "name more text"
    return InputError(
        request.key,
        f"holds {seen.tokens} tokens, less than one block of {request.block_size}; {fix}, or lower data.block_size",
    )


def _more_held_out(request: Request, tokenizer: PreTrainedTokenizerBase) -> str:
    """What to do where the documents held out make no block."""
    fraction = _least_fraction(request, tokenizer)
    raised = "" if fraction is None else f", or raise data.validation_fraction to {fraction}"
    return f"name a validation set{raised}"


def _least_fraction(request: Request, tokenizer: PreTrainedTokenizerBase) -> float | None:
    """The least share, of four decimals, at which what is held out makes a block and the rest another; None: there is
    none. All documents are read and tokenised again, as only an error needs to know.
    """
    everything = replace(request, selection=Selection())
    # in the order of their digests the share catches them
    found = sorted((d.digest, len(d.ids)) for d in _encoded(everything, tokenizer, Summary(), _Seen()))
    needed = 1 if request.chat else request.block_size  # a conversation is padded to a block
    totals = accumulate(tokens for _, tokens in found)
    last = next((digest for (digest, _), total in zip(found, totals, strict=True) if total >= needed), None)
    if last is None:
        return None
    fraction = ((int(last[:16], 16) * 10_000 >> 64) + 1) / 10_000
    left = sum(tokens for digest, tokens in found if Selection(fraction).takes(digest))
    return fraction if left >= needed else None
