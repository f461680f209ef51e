"""Perplexity of a text with the protocol that it depends on, and bits per byte, which compare across tokenizers.

Windows of B tokens follow each other by S tokens, and each scores what no earlier one has. With S below B every token
but the text's first is scored, with at least B - S tokens before it (or all there are). With S = B, disjoint blocks as
many papers have them, the first token of each block is scored by none.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from laco_train.errors import InputError

_IGNORED = -100
_MOST_TOKENS = 4096  # in one forward pass: its logits, of 256,000 entries each in float32, are 4 GB


@dataclass(frozen=True)
class Protocol:
    """What a perplexity can't be compared without.

    Attributes:
        block_length: tokens of a window.
        stride: tokens from one window to the next.
        tokenizer: class and number of entries.
        special_tokens: always none: neither a first nor a last token is added to the text.
        text: sha256 of the text in UTF-8.
        tokens: sha256 of the token ids, comma-separated: equal means the same tokens.
    """

    block_length: int
    stride: int
    tokenizer: str
    special_tokens: str
    text: str
    tokens: str


@dataclass(frozen=True)
class Perplexity:
    """A text under a model.

    Attributes:
        loss: nats per token scored.
        bits_per_byte: of the text in UTF-8: loss times tokens per byte, over ln 2.
        tokens: how many were scored.
        bytes: of the whole text.
        protocol: how it was measured.
    """

    loss: float
    bits_per_byte: float
    tokens: int
    bytes: int
    protocol: Protocol

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that has no float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


@dataclass(frozen=True)
class Window:
    """Tokens `begin` to `end` of the text, of which the last `scored` count."""

    begin: int
    end: int
    scored: int


def windows(tokens: int, block: int, stride: int) -> list[Window]:
    """Windows over a text of `tokens` tokens, each scoring what no earlier one has and something in it predicts."""
    found: list[Window] = []
    begin, done = 0, 0
    while done < tokens:
        end = min(begin + block, tokens)
        found.append(Window(begin, end, end - max(done, begin + 1)))
        begin, done = begin + stride, end
    return [window for window in found if window.scored > 0]


def check_windows(block: int, stride: int, positions: int | None = None) -> None:
    """Refuse windows that score nothing, skip tokens, or don't fit a model of so many `positions`."""
    if block < 2:
        raise InputError("--block", f"must be 2 or more, is {block}")
    if not 1 <= stride <= block:
        raise InputError("--stride", f"must be 1 to {block}, the length of a block, is {stride}")
    if positions is not None and block > positions:
        raise InputError("--block", f"is {block}, more than the model's {positions} positions; lower it")


def measure_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    block: int,
    stride: int,
    batch_size: int,
    on_window: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Loss of `text` under `model`, on the model's device, in its dtype, the cross entropy in float32.

    Args:
        model: in eval mode.
        tokenizer: of the model; it adds no special tokens here.
        text: of two tokens or more.
        block: B, tokens of a window.
        stride: S, tokens from one window to the next.
        batch_size: windows in one forward pass, at most; fewer where they hold more than 4,096 tokens.
        on_window: called with how many windows are done, of how many.

    Raises:
        InputError: windows that `check_windows` refuses, a text of fewer than two tokens, or a loss that is not finite.
    """
    check_windows(block, stride, getattr(model.config, "max_position_embeddings", None))
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    plan = windows(len(ids), block, stride)
    if not plan:
        raise InputError("--perplexity", "the text has fewer than two tokens, so none is predicted; name a longer one")
    tokens, total, done = torch.tensor(ids), 0.0, 0
    # windows of one batch have one length and score as many tokens
    for _, alike in groupby(plan, key=lambda window: (window.end - window.begin, window.scored)):
        same = list(alike)
        rows = max(1, min(batch_size, _MOST_TOKENS // (same[0].end - same[0].begin)))
        for start in range(0, len(same), rows):
            batch = same[start : start + rows]
            total += _summed(model, tokens, batch)
            done += len(batch)
            if on_window is not None:
                on_window(done, len(plan))
    if not math.isfinite(total):
        raise InputError("--perplexity", "the loss of this model is not finite; try --dtype float32")
    scored, size = sum(window.scored for window in plan), len(text.encode())
    protocol = Protocol(
        block_length=block,
        stride=stride,
        tokenizer=f"{type(tokenizer).__name__}, {len(tokenizer):,} entries",
        special_tokens="none",
        text=hashlib.sha256(text.encode()).hexdigest(),
        tokens=hashlib.sha256(",".join(map(str, ids)).encode()).hexdigest(),
    )
    loss = total / scored
    return Perplexity(loss, loss * len(ids) / size / math.log(2), scored, size, protocol)


@torch.inference_mode()
def _summed(model: PreTrainedModel, tokens: Tensor, batch: list[Window]) -> float:
    """Summed nats of what the windows of `batch`, alike in shape, score."""
    rows = torch.stack([tokens[window.begin : window.end] for window in batch]).to(model.device)
    labels = rows[:, 1:].clone()
    labels[:, : labels.shape[1] - batch[0].scored] = _IGNORED
    logits = model(input_ids=rows, use_cache=False).logits
    # (windows, B - 1, V) against the token that follows each; a float32 sum of many would round
    losses = cross_entropy(logits[:, :-1].float().flatten(0, 1), labels.flatten(), reduction="none")
    return losses.double().sum().item()
