"""Packing of documents into blocks, token by token and without any buffer."""

IGNORED = -100


def packed_text(documents: list[list[int]], block_size: int) -> list[list[tuple[int, int, int]]]:
    """Blocks of (id, label, position) from documents (EOS included): cut at every multiple of `block_size`."""
    stream = [(token, i == 0) for document in documents for i, token in enumerate(document)]
    blocks = []
    for start in range(0, len(stream) - len(stream) % block_size, block_size):
        block: list[tuple[int, int, int]] = []
        for token, first in stream[start : start + block_size]:
            position = 0 if first or not block else block[-1][2] + 1
            block.append((token, IGNORED if first else token, position))
        blocks.append(block)
    return blocks


def packed_whole(
    documents: list[tuple[list[int], list[int]]], block_size: int, pad_id: int
) -> list[list[tuple[int, int, int]]]:
    """Blocks of (id, label, position): documents (ids, labels) uncut, each where the last one still leaves room."""
    bins: list[list[tuple[int, int, int]]] = []
    for ids, labels in documents:
        if not bins or len(bins[-1]) + len(ids) > block_size:
            bins.append([])
        bins[-1] += [(token, label, i) for i, (token, label) in enumerate(zip(ids, labels, strict=True))]
    return [bin_ + [(pad_id, IGNORED, i) for i in range(block_size - len(bin_))] for bin_ in bins]
