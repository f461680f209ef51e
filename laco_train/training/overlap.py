"""Calibration text that also occurs in the validation data: the layers would be chosen on what they are judged by."""

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase


def occurring(samples: Sequence[str], text: str) -> list[str]:
    """The `samples` that occur in `text`, whatever the white space between their words."""
    flat = " ".join(text.split())
    return [sample for sample in samples if " ".join(sample.split()) in flat]


def text_of(blocks: Iterable[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that was packed into `blocks` of token ids, documents and blocks joined."""
    return "".join(str(tokenizer.decode(list(block), skip_special_tokens=True)) for block in blocks)
