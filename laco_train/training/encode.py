"""Text and conversations to token ids and labels, in batches through the tokenizer."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from laco_train.errors import InputError
from laco_train.training.packing import IGNORED, Ids
from laco_train.training.sources import Row

# A template joins strings: a list or null in a message ends in Python's own error, not in Jinja's.
_REFUSALS = (TemplateError, TypeError)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[tuple[Ids, Ids]]:
    """(ids, labels) of each text: no special tokens but EOS at the end; a text without tokens gives empty arrays.

    The first token has no label, as it must not be predicted from the EOS of another document.
    """
    batch = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    encoded = []
    for tokens in batch["input_ids"]:
        ids = np.array([*tokens, tokenizer.eos_token_id] if tokens else [], np.int32)
        labels = ids.copy()
        labels[:1] = IGNORED
        encoded.append((ids, labels))
    return encoded


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], block_size: int
) -> list[tuple[Ids, Ids]]:
    """(ids, labels) of each conversation through the chat template, cut at `block_size` tokens.

    Labels are the assistant's turns with their end-of-turn token. A template that marks them by {% generation %} is
    followed; else they are found by rendering the turns before each (see `assistant_spans`).
    An assistant's turn that opens a conversation answers nobody and has no label in the second way.

    Raises:
        InputError: a row is no list of messages, the template refuses it, or turns can't be told apart.
    """
    conversations = [_checked(row) for row in rows]
    if _GENERATION.search(tokenizer.get_chat_template()):
        batch = [_by_template(tokenizer, c, row.where) for c, row in zip(conversations, rows, strict=True)]
    else:
        batch = _by_prefixes(tokenizer, conversations, [row.where for row in rows])
    encoded = []
    for tokens, mask in batch:
        ids = np.array(tokens[:block_size], np.int32)
        labels = np.where(mask[:block_size], ids, IGNORED).astype(np.int32)
        labels[:1] = IGNORED
        encoded.append((ids, labels))
    return encoded


def assistant_spans(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], where: str
) -> list[tuple[int, int]]:
    """Character spans [start, end) of the assistant's turns in the rendered conversation.

    A turn starts where the rendering of the messages before it, with the generation prompt, ends, and ends where the
    rendering of the messages up to it ends. Both must be prefixes of the whole rendering.

    Raises:
        InputError: they aren't: the template renders a turn differently once others follow.
    """
    whole = render(tokenizer, messages, where)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or i == 0:
            continue
        before = render(tokenizer, messages[:i], where, add_generation_prompt=True)
        until = render(tokenizer, messages[: i + 1], where)
        if not (whole.startswith(until) and until.startswith(before)):
            raise InputError(
                "data.format",
                f"the chat template renders message {i + 1} of {where} differently once others follow, so the "
                "assistant's turns can't be found; use a template with {% generation %} marks",
            )
        spans.append((len(before), len(until)))
    return spans


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], where: str, **options: Any) -> str:
    """The conversation as text; a template that refuses it is an InputError."""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except _REFUSALS as error:
        raise InputError("data.format", f"the chat template refuses {where} ({error}); mend or drop it") from error


def _by_template(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], where: str
) -> tuple[list[int], NDArray[np.bool_]]:
    try:
        encoded: Any = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    except _REFUSALS as error:
        raise InputError("data.format", f"the chat template refuses {where} ({error}); mend or drop it") from error
    return encoded["input_ids"], np.array(encoded["assistant_masks"], bool)


def _by_prefixes(
    tokenizer: PreTrainedTokenizerBase, conversations: list[list[dict[str, Any]]], places: list[str]
) -> list[tuple[list[int], NDArray[np.bool_]]]:
    if not tokenizer.is_fast:
        raise InputError("data.format", "chat needs a fast tokenizer or a template with {% generation %} marks")
    texts = [render(tokenizer, messages, where) for messages, where in zip(conversations, places, strict=True)]
    batch = tokenizer(
        texts, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )
    special = np.array(sorted(tokenizer.all_special_ids))
    encoded = []
    for i, text in enumerate(texts):
        tokens, offsets = batch["input_ids"][i], np.array(batch["offset_mapping"][i]).reshape(-1, 2)
        mask = np.zeros(len(tokens), bool)
        for start, end in assistant_spans(tokenizer, conversations[i], places[i]):
            # The line break that a template puts after the end-of-turn token is never generated.
            tight = len(text[:end].rstrip())
            if np.isin(np.array(tokens)[offsets[:, 1] == tight], special).any():
                end = tight
            mask |= (offsets[:, 0] >= start) & (offsets[:, 0] < end)
        encoded.append((tokens, mask))
    return encoded


def _checked(row: Row) -> list[dict[str, Any]]:
    ok = isinstance(row.value, list) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in row.value)
    if not ok or not row.value:
        raise InputError("data.format", f"{row.where} is no list of {{role, content}} messages; see data.column")
    return row.value
