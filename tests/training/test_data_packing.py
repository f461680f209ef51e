"""Packing against a naive oracle, and what it is for: a packed document computes what it computes alone."""

from collections.abc import Callable

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from laco_train.training.encode import encode_texts
from laco_train.training.packing import Block, Encoded, pack_text, pack_whole
from tests.oracles.packing import IGNORED, packed_text, packed_whole

BLOCK_SIZES = st.integers(2, 12)
DOCUMENTS = st.lists(st.lists(st.integers(3, 99), min_size=1, max_size=30), max_size=12)


def triples(block: Block) -> list[tuple[int, int, int]]:
    return list(zip(block.input_ids.tolist(), block.labels.tolist(), block.position_ids.tolist(), strict=True))


def encoded(ids: list[int], labels: list[int]) -> Encoded:
    return Encoded(np.array(ids, np.int32), np.array(labels, np.int32), digest="")


@settings(deadline=None)
@given(documents=DOCUMENTS, block_size=BLOCK_SIZES)
def test_text_blocks_equal_the_oracle(documents: list[list[int]], block_size: int) -> None:
    packed = list(pack_text((encoded(d, [IGNORED, *d[1:]]) for d in documents), block_size))
    assert [triples(block) for block in packed] == packed_text(documents, block_size)
    assert all(block.filled == block_size for block in packed)
    starts = [sum(map(len, documents[:i])) // block_size for i in range(len(documents))]
    assert [block.documents for block in packed] == [starts.count(i) for i in range(len(packed))]


@settings(deadline=None)
@given(documents=DOCUMENTS, block_size=BLOCK_SIZES)
def test_whole_blocks_equal_the_oracle(documents: list[list[int]], block_size: int) -> None:
    pairs = [(d[:block_size], [IGNORED, *d[1:block_size]]) for d in documents]
    packed = list(pack_whole((encoded(*pair) for pair in pairs), block_size, pad_id=1))
    assert [triples(block) for block in packed] == packed_whole(pairs, block_size, pad_id=1)
    assert sum(block.filled for block in packed) == sum(len(ids) for ids, _ in pairs)
    firsts = [sum(position == 0 for *_, position in triples(block)[: block.filled]) for block in packed]
    assert [block.documents for block in packed] == firsts


def test_packing_reads_no_further_than_asked() -> None:
    read: list[int] = []

    def documents() -> object:
        for i in range(1000):
            read.append(i)
            yield encoded([5] * 7, [5] * 7)

    blocks = pack_text(documents(), block_size=10)
    next(blocks)
    assert read == [0, 1]


@settings(deadline=None, max_examples=30)
@given(texts=st.lists(st.text(max_size=40), min_size=1, max_size=6))
def test_texts_end_in_eos_and_their_first_token_is_not_predicted(
    tiny_tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> None:
    texts = [text.encode("utf-8", "ignore").decode() for text in texts]
    for text, (ids, labels) in zip(texts, encode_texts(tiny_tokenizer, texts), strict=True):
        tokens = tiny_tokenizer.encode(text, add_special_tokens=False)
        assert ids.tolist() == ([*tokens, tiny_tokenizer.eos_token_id] if tokens else [])
        assert labels.tolist() == [IGNORED, *ids.tolist()[1:]][: len(ids)]


def leak(model: LlamaForCausalLM, documents: list[list[int]], block: Block, positions: torch.Tensor) -> float:
    """Largest difference of logits between documents alone and packed."""
    with torch.no_grad():
        packed = model(
            input_ids=torch.from_numpy(block.input_ids).long()[None], position_ids=positions[None], use_cache=False
        ).logits[0]
        start, worst = 0, 0.0
        for document in documents:
            alone = model(input_ids=torch.tensor([document]), use_cache=False).logits[0]
            worst = max(worst, (packed[start : start + len(document)] - alone).abs().max().item())
            start += len(document)
    return worst


def test_packed_documents_do_not_see_each_other(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    documents = [[7, 9, 11, 13, 0], [21, 22, 0], [31, 32, 33, 34, 35, 36, 0]]
    (block,) = pack_text((encoded(d, d) for d in documents), block_size=15)
    model = tiny_llama(layers=3)
    assert leak(model, documents, block, torch.from_numpy(block.position_ids).long()) < 1e-5
    assert leak(model, documents, block, torch.arange(15)) > 1e-2


def test_padding_does_not_see_documents(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    documents = [[7, 9, 11, 13, 0], [21, 22, 0]]
    (block,) = pack_whole((encoded(d, d) for d in documents), block_size=12, pad_id=1)
    positions = torch.from_numpy(block.position_ids).long()
    assert leak(tiny_llama(layers=3), [*documents, [1] * 4], block, positions) < 1e-5
