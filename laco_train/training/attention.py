"""Attention within documents only, on a flash kernel of variable-length sequences (issue 5, Speed).

A dense mask of the documents in a block would take attention off the flash path. Transformers lets a function be
registered under a name, makes no mask for it, and hands it the keyword arguments of the model's call.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "laco_train_documents"
_HALF = (torch.bfloat16, torch.float16)


def document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    documents: Tensor | None = None,
    longest: int = 0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention of each token to its own document.

    Args:
        query: (B, H, T, D) on a GPU; in float32 it is rounded to autocast's type.
        key, value: (B, H of keys and values, T, D).
        documents: (documents + 1,) int32: where each document starts in the B * T tokens, and B * T.
        longest: no document is longer; T will do.
        sliding_window: tokens that a token sees, itself included; None: all before it.

    Returns:
        (B, T, H, D), and None for the weights.

    Raises:
        NotImplementedError: a feature that the kernel lacks.
    """
    from torch.nn.attention.varlen import varlen_attn

    if documents is None:
        raise NotImplementedError("attention by documents needs to know them")
    if dropout or others.get("softcap") is not None or others.get("s_aux") is not None:
        raise NotImplementedError("dropout, capped scores and sinks are not in the flash kernel")
    batch, heads, tokens, width = query.shape
    dtype = query.dtype if query.dtype in _HALF else torch.get_autocast_dtype("cuda")
    flat = [x.transpose(1, 2).reshape(batch * tokens, -1, width).to(dtype) for x in (query, key, value)]
    grouped: dict[str, Any] = {"enable_gqa": True} if _NAMES_GROUPS and key.shape[1] != heads else {}
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    attend: Any = varlen_attn
    out: Tensor = attend(*flat, documents, documents, longest, longest, scale=scaling, window_size=window, **grouped)
    return out.view(batch, tokens, heads, width), None


def _names_groups() -> bool:
    # torch 2.11 takes fewer heads of keys as they come, later versions want to be told
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


_NAMES_GROUPS = _names_groups()
AttentionInterface.register(NAME, document_attention)


def attends_by_documents(model: nn.Module) -> bool:
    """Whether `model` must be called with `documents` and `longest`."""
    return getattr(model.config, "_attn_implementation", None) == NAME


def set_document_attention(model: nn.Module, on: bool) -> None:
    """Switch `model`, a Transformers model or one wrapped by peft, to this attention, or back to Transformers' own."""
    plain = "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"
    model.config._attn_implementation = NAME if on else plain  # type: ignore[union-attr]
