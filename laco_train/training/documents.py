"""Documents packed into a block, kept apart also where Transformers does not tell them by positions that restart.

Of Transformers 5.17 to 5.23, GPT-OSS, OPT and Falcon take position_ids without making their masks from them.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from laco_train.collapse.families import FAMILIES, MASK, MASKS, NOT_APART

_WAYS = {family.model_type: family.documents for family in FAMILIES}
_TOKENS = 8  # of each document that is tried
_NEAR = 0.05  # half precision rounds logits by less, relative to all of them


def document_masks_of(model: nn.Module, position_ids: Tensor) -> dict[str, Any]:
    """What `model`, a Transformers model or one wrapped by peft, must be given beside positions; mostly nothing.

    Transformers' own masks, as it makes them for the other families.

    Args:
        position_ids: (B, T); a document begins where they are 0.
    """
    way = _way(model.config)
    if way not in (MASK, MASKS):
        return {}
    given: dict[str, Any] = {
        "config": model.config,
        "inputs_embeds": torch.empty(
            *position_ids.shape, 1, dtype=next(model.parameters()).dtype, device=position_ids.device
        ),
        "attention_mask": None,
        "past_key_values": None,
        "position_ids": position_ids,
    }
    full = create_causal_mask(**given)
    if way == MASK:
        return {"attention_mask": full}
    return {"attention_mask": {"full_attention": full, "sliding_attention": create_sliding_window_causal_mask(**given)}}


def _way(config: Any) -> str | None:
    """Of `Family.documents`; None for a family without a row."""
    if getattr(config, "alibi", False):  # Falcon makes its biases from a mask of another shape
        return NOT_APART
    return _WAYS.get(config.model_type)


def keeps_documents_apart(model: PreTrainedModel) -> bool:
    """Whether a document is computed behind another one as it is alone; tried for a family without a row.

    Args:
        model: whole, with weights.
    """
    way = _way(model.config)
    return bool(_moved(model) < _NEAR) if way is None else way != NOT_APART


@torch.no_grad()
def _moved(model: PreTrainedModel) -> Tensor:
    """How far logits of a document are from those it has alone, relative to these."""
    device = next(model.parameters()).device
    ids = torch.arange(2 * _TOKENS, device=device)[None] % model.config.get_text_config().vocab_size
    places = ids.new_tensor([[*range(_TOKENS)] * 2])
    behind = model(input_ids=ids, position_ids=places, use_cache=False).logits[:, _TOKENS:].float()
    own = slice(_TOKENS, None)
    alone = model(input_ids=ids[:, own], position_ids=places[:, own], use_cache=False).logits.float()
    return (behind - alone).norm() / alone.norm()
