"""Attention within documents only, by flex attention (issue 5, Speed).

A dense mask of the documents in a block takes attention off the fast kernels and makes it compute what the mask throws
away. Transformers lets a function be registered under a name, makes no mask for it, and hands it the keyword arguments
of the model's call: here block masks, made once a batch, by which whole tiles between documents are left out.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad
from transformers import AttentionInterface

NAME = "laco_train_documents"
_TILE = 128  # of queries by keys; what flex attention takes by default
_HALF = (torch.bfloat16, torch.float16)
# inside a compiled layer it is compiled with it; on its own it would compute every tile
_attend: Any = torch.compile(flex_attention, dynamic=False)


def document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    documents: BlockMask | None = None,
    windowed: BlockMask | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each token to its own document.

    Args:
        query: (B, H, T, D); under autocast in float32 it is rounded to autocast's type.
        key, value: (B, H of keys and values, T, D).
        documents, windowed: of `document_masks`.
        sliding_window: tokens that a token sees, itself included; None: all before it.
        softcap: scores are bent to stay below this.

    Returns:
        (B, T, H, D), and None for the weights.

    Raises:
        NotImplementedError: a feature that is not covered, or a call without masks.
    """
    if documents is None:
        raise NotImplementedError("attention by documents needs to know them")
    if dropout or others.get("s_aux") is not None:
        raise NotImplementedError("attention dropout and sinks are not covered")
    if query.dtype not in _HALF and torch.is_autocast_enabled(query.device.type):
        narrow = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(narrow), key.to(narrow), value.to(narrow)
    mask = documents
    if sliding_window is not None and sliding_window < query.shape[2]:
        if windowed is None:
            raise NotImplementedError("a window that the model's config does not name")
        mask = windowed

    def capped(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        assert softcap is not None
        return softcap * torch.tanh(score / softcap)

    out: Tensor = _attend(
        query,
        key,
        value,
        score_mod=None if softcap is None else capped,
        block_mask=mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, document_attention)


def document_masks(position_ids: Tensor, window: int | None) -> dict[str, BlockMask]:
    """Keyword arguments for `document_attention`, made without the host waiting.

    torch's ``create_block_mask`` gives the same from the whole (T, T) mask, in 6 ms of the host's time; documents are
    stretches, so the first and the last of a tile tell.

    Args:
        position_ids: (B, T); a document begins where they are 0.
        window: the model's sliding window, if it has one.
    """
    tokens = position_ids.shape[1]
    tiles = -(-tokens // _TILE)
    document = (position_ids == 0).cumsum(1)
    # a tile that is not all tokens counts as one with two documents
    padded = pad(document, (0, tiles * _TILE - tokens), value=tokens + 1)
    first, last = padded[:, ::_TILE], padded[:, _TILE - 1 :: _TILE]
    q = torch.arange(tiles, device=document.device)[:, None]
    k = q.T
    near = (k <= q) & (last[:, None, :] >= first[:, :, None])
    inside = (k < q) & (first[:, None, :] == last[:, :, None])

    def within(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (document[b, q] == document[b, k]) & (q >= k)

    masks = {"documents": _block_mask(near, inside, within, tokens)}
    if window is not None and window < tokens:

        def windowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return within(b, h, q, k) & (q - k < window)

        # distances between tokens of two tiles lie within a tile's width of that between the tiles
        near = near & ((q - k - 1) * _TILE + 1 < window)
        inside = inside & ((q - k + 1) * _TILE - 1 < window)
        masks["windowed"] = _block_mask(near, inside, windowed, tokens)
    return masks


def _block_mask(near: Tensor, inside: Tensor, mask: Callable[..., Tensor], tokens: int) -> BlockMask:
    """A mask of which tiles `near` may hold something, and tiles `inside` hold all; both (B, tiles, tiles)."""
    part, full = _lists(near & ~inside), _lists(inside)
    return BlockMask.from_kv_blocks(*part, *full, BLOCK_SIZE=_TILE, mask_mod=mask, seq_lengths=(tokens, tokens))


def _lists(kept: Tensor) -> tuple[Tensor, Tensor]:
    """For each tile of queries how many tiles of keys are `kept`, and which, those first; one head for all."""
    kept = kept[:, None]
    return kept.sum(-1, dtype=torch.int32), kept.byte().argsort(dim=-1, descending=True, stable=True).int()


def attends_by_documents(model: nn.Module) -> bool:
    """Whether `model` must be called with `document_masks`."""
    return getattr(model.config, "_attn_implementation", None) == NAME


def set_document_attention(model: nn.Module, on: bool) -> None:
    """Switch `model`, a Transformers model or one wrapped by peft, to this attention, or back to Transformers' own."""
    plain = "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"
    model.config._attn_implementation = NAME if on else plain  # type: ignore[union-attr]
