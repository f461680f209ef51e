"""Next-token loss on packed blocks.

Shapes: B blocks, T tokens, V vocabulary.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import pad

from laco_train.training.attention import attends_by_documents, document_masks
from laco_train.training.documents import document_masks_of

Batch = dict[str, Tensor]


def causal_lm_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy in nats per target token.

    Documents in a block are kept apart by positions that restart, which Transformers honours only without a cache and
    without an attention mask, and where it does not, by masks (`laco_train.training.documents`).

    Args:
        batch: ``input_ids``, ``labels`` (-100 where nothing is to be predicted) and ``position_ids``, each (B, T).
    """
    return model(**model_inputs(model, batch), labels=batch["labels"]).loss


def model_inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Keyword arguments of a call of `model`, a Transformers model or one wrapped by peft, on a batch."""
    inputs: dict[str, Any] = {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        "use_cache": False,
    }
    if attends_by_documents(model):
        inputs |= document_masks(batch["position_ids"], getattr(model.config, "sliding_window", None))
    else:
        inputs |= document_masks_of(model, batch["position_ids"])
    return inputs


def base_of(model: nn.Module) -> Any:
    """The Transformers model itself, with the adapters that peft has put into it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def next_tokens(batch: Batch) -> Tensor:
    """(B, T) the label of the token after each; -100 where there is none, as at the end of a block."""
    return pad(batch["labels"], (0, 1), value=-100)[:, 1:]


def target_tokens(batch: Batch) -> Tensor:
    """Number of tokens that `causal_lm_loss` averages over: the first of a block is never a target."""
    return (batch["labels"][:, 1:] != -100).sum()


@dataclass(frozen=True)
class MeanLoss:
    """Loss over a data set: nats per target token, and the number of those."""

    loss: float
    tokens: int


@torch.no_grad()
def mean_loss(
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    context: Callable[[], AbstractContextManager[None]],
    total_over_ranks: Callable[[Tensor], Tensor] | None = None,
    loss_of: Callable[[nn.Module, Batch], Tensor] = causal_lm_loss,
) -> MeanLoss:
    """One plain pass over `batches`, for where no Lightning loop can run.

    Args:
        context: the precision under which the model trains, as a context manager.
        loss_of: of a batch.
        total_over_ranks: adds up a tensor over the ranks, each of which passes over its own batches.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros(2, dtype=torch.float64)  # loss times tokens, and tokens
    for cpu_batch in batches:
        batch = {name: value.to(device) for name, value in cpu_batch.items()}
        tokens = int(target_tokens(batch))
        with context():
            loss = loss_of(model, batch).double().cpu()
        if tokens > 0:  # a chat block cut before its first answer has no loss; a sharded model needs its pass
            total += torch.stack([loss * tokens, torch.tensor(float(tokens), dtype=torch.float64)])
    model.train(was_training)
    if total_over_ranks is not None:
        total = total_over_ranks(total.to(device)).cpu()
    count = int(total[1])
    return MeanLoss(float(total[0]) / max(count, 1), count)
