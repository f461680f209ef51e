"""Documents to fixed blocks: pure generators, which read only as far as their consumer does.

Packed documents are isolated by ``position_ids`` that restart at 0: Transformers derives a block-diagonal mask from
them if the model is called without an attention mask and with ``use_cache=False``; `documents` tells where it does not.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IGNORED = -100
"""Label of a token that no loss is taken on."""

Ids = NDArray[np.int32]


@dataclass(frozen=True)
class Encoded:
    """A tokenised document.

    Attributes:
        ids: (tokens,) token ids.
        labels: (tokens,) the same, or IGNORED.
        digest: sha256 of the text it came from.
    """

    ids: Ids
    labels: Ids
    digest: str


@dataclass(frozen=True)
class Block:
    """`block_size` tokens; the first `filled` come from documents, the rest is padding.

    Attributes:
        input_ids, labels, position_ids: (block_size,) each.
        documents: number of those that begin in it.
    """

    input_ids: Ids
    labels: Ids
    position_ids: Ids
    filled: int
    documents: int


class _Draft:
    """A block being filled."""

    def __init__(self, size: int):
        self.input_ids = np.empty(size, np.int32)
        self.labels = np.empty(size, np.int32)
        self.position_ids = np.empty(size, np.int32)
        self.fill = 0
        self.documents = 0

    @property
    def space(self) -> int:
        return len(self.input_ids) - self.fill

    def put(self, ids: Ids, labels: Ids) -> None:
        """Append a piece that fits, of a document or padding; its positions start at 0."""
        part = slice(self.fill, self.fill + len(ids))
        self.input_ids[part], self.labels[part] = ids, labels
        self.position_ids[part] = np.arange(len(ids))
        self.fill = part.stop

    def full(self) -> Block:
        return Block(self.input_ids, self.labels, self.position_ids, self.fill, self.documents)

    def padded(self, pad_id: int) -> Block:
        filled = self.fill
        padding = np.full(self.space, pad_id, np.int32)
        self.put(padding, np.full_like(padding, IGNORED))
        return Block(self.input_ids, self.labels, self.position_ids, filled, self.documents)


def pack_text(documents: Iterable[Encoded], block_size: int) -> Iterator[Block]:
    """Concatenate documents and cut the stream every `block_size` tokens; an incomplete last block is dropped.

    Positions restart at each document and at each block's start.
    """
    draft = _Draft(block_size)
    for document in documents:
        start = 0
        while start < len(document.ids):
            part = slice(start, start + draft.space)
            draft.put(document.ids[part], document.labels[part])
            draft.documents += start == 0
            start = part.stop
            if draft.space == 0:
                yield draft.full()
                draft = _Draft(block_size)


def pack_whole(documents: Iterable[Encoded], block_size: int, pad_id: int) -> Iterator[Block]:
    """Pack documents of at most `block_size` tokens without cutting them (next fit); the rest of a block is padding.

    Positions restart at each document and at the padding; labels of padding are IGNORED.
    """
    draft = _Draft(block_size)
    for document in documents:
        if len(document.ids) > draft.space:
            yield draft.padded(pad_id)
            draft = _Draft(block_size)
        draft.put(document.ids, document.labels)
        draft.documents += 1
    if draft.fill:
        yield draft.padded(pad_id)
