"""Every token scored once and with its context, against one forward pass a token."""

import copy
import hashlib
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from laco_train.errors import InputError
from laco_train.evaluation.perplexity import check_windows, measure_perplexity, windows
from tests.conftest import SENTENCES

TEXT = "\n\n".join(SENTENCES)
Builder = Callable[..., LlamaForCausalLM]


@given(st.integers(0, 200), st.integers(2, 40), st.data())
@settings(deadline=None)
def test_every_token_but_the_first_is_scored_once(tokens: int, block: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, block))
    found = windows(tokens, block, stride)
    scored = [position for one in found for position in range(one.end - one.scored, one.end)]
    unscored = set(range(0, tokens, block)) if stride == block else {0}
    assert scored == [position for position in range(tokens) if position not in unscored]
    for one in found:
        assert one.begin < one.end <= tokens and one.end - one.begin <= block
        first = one.end - one.scored
        assert first - one.begin >= min(first, max(1, block - stride))


@pytest.mark.parametrize(("block", "stride"), [(16, 8), (16, 16), (16, 1), (250, 250), (12, 7)])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_loss_is_that_of_a_slow_loop(
    block: int, stride: int, batch_size: int, tiny_llama: Builder, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_llama(layers=2)
    ids = tiny_tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    losses = []
    for start in range(0, len(ids), stride):
        for position in range(start + 1, min(start + block, len(ids))):
            if start == 0 or position >= start + block - stride:
                with torch.no_grad():
                    logits = model(torch.tensor([ids[start:position]])).logits[0, -1]
                losses.append(-logits.log_softmax(-1)[ids[position]].item())
    found = measure_perplexity(model, tiny_tokenizer, TEXT, block=block, stride=stride, batch_size=batch_size)
    assert found.tokens == len(losses)
    assert found.loss == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.bits_per_byte == pytest.approx(found.loss * len(ids) / len(TEXT.encode()) / math.log(2))


def test_protocol_names_all_that_it_hangs_on(tiny_llama: Builder, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model, text = tiny_llama(layers=1), "Grüße aus Köln, der Stadt am Rhein."
    found = measure_perplexity(model, tiny_tokenizer, text, block=8, stride=4, batch_size=2)
    ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    protocol = found.protocol
    assert (protocol.block_length, protocol.stride, protocol.special_tokens) == (8, 4, "none")
    assert protocol.text == hashlib.sha256(text.encode()).hexdigest()
    assert protocol.tokens == hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest()
    assert "320 entries" in protocol.tokenizer
    assert found.bytes == len(text.encode()) > len(text)


def test_no_special_token_is_added(tiny_llama: Builder, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    adding = copy.deepcopy(tiny_tokenizer)
    first = ("<|im_start|>", adding.convert_tokens_to_ids("<|im_start|>"))
    adding.backend_tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[first])
    assert len(adding(TEXT)["input_ids"]) == len(tiny_tokenizer(TEXT)["input_ids"]) + 1
    model = tiny_llama(layers=1)
    found = [
        measure_perplexity(model, one, TEXT, block=32, stride=16, batch_size=4) for one in (adding, tiny_tokenizer)
    ]
    assert found[0] == found[1]


def test_bits_per_byte_compare_across_tokenizers(tiny_llama: Builder, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """A model that knows nothing but equal chances needs log2(V) bits a token, however the text is cut."""
    model = tiny_llama(layers=1)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    found = measure_perplexity(model, tiny_tokenizer, TEXT, block=32, stride=16, batch_size=4)
    tokens = len(tiny_tokenizer(TEXT, add_special_tokens=False)["input_ids"])
    assert found.perplexity == pytest.approx(320, rel=1e-4)
    assert found.bits_per_byte == pytest.approx(math.log2(320) * tokens / len(TEXT), rel=1e-4)


def test_progress_reaches_the_end(tiny_llama: Builder, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    seen: list[tuple[int, int]] = []
    measure_perplexity(
        tiny_llama(layers=1),
        tiny_tokenizer,
        TEXT,
        block=16,
        stride=8,
        batch_size=4,
        on_window=lambda done, of: seen.append((done, of)),
    )
    assert seen[-1][0] == seen[-1][1] > 10


def test_a_batch_of_many_windows_is_cut(tiny_llama: Builder, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """The logits of 128 windows of 1,024 tokens would take 25 GB of a small model."""
    model, sizes = tiny_llama(layers=1), list[int]()
    model.lm_head.register_forward_hook(lambda module, inputs, logits: sizes.append(logits.shape[:-1].numel()))
    found = measure_perplexity(model, tiny_tokenizer, TEXT * 40, block=32, stride=32, batch_size=1000)
    assert len(sizes) > 2 and max(sizes) == 4096
    one = measure_perplexity(model, tiny_tokenizer, TEXT * 40, block=32, stride=32, batch_size=1)
    assert found.loss == pytest.approx(one.loss, rel=1e-6)


@pytest.mark.parametrize(
    ("block", "stride", "positions", "problem"),
    [
        (1, 1, None, "--block: must be 2 or more, is 1"),
        (8, 9, None, "--stride: must be 1 to 8"),
        (8, 0, None, "--stride: must be 1 to 8"),
        (512, 256, 256, "--block: is 512, more than the model's 256 positions"),
    ],
)
def test_windows_that_measure_nothing(block: int, stride: int, positions: int | None, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        check_windows(block, stride, positions)


def test_a_text_too_short_and_a_broken_model(tiny_llama: Builder, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_llama(layers=1)
    with pytest.raises(InputError, match=r"^--perplexity: the text has fewer than two tokens"):
        measure_perplexity(model, tiny_tokenizer, "a", block=8, stride=4, batch_size=1)
    with torch.no_grad():
        model.lm_head.weight[0] = float("nan")
    with pytest.raises(InputError, match=r"^--perplexity: the loss of this model is not finite"):
        measure_perplexity(model, tiny_tokenizer, TEXT, block=8, stride=4, batch_size=1)
