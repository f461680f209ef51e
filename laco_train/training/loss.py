"""Next-token loss on packed blocks.

Shapes: B blocks, T tokens, V vocabulary.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]


def causal_lm_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy in nats per target token.

    Documents in a block are kept apart by positions that restart, which Transformers honours only without a cache and
    without an attention mask.

    Args:
        batch: ``input_ids``, ``labels`` (-100 where nothing is to be predicted) and ``position_ids``, each (B, T).
    """
    return model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], labels=batch["labels"], use_cache=False
    ).loss


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
) -> MeanLoss:
    """One plain pass over `batches`, for where no Lightning loop can run.

    Args:
        context: the precision under which the model trains, as a context manager.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    for cpu_batch in batches:
        batch = {name: value.to(device) for name, value in cpu_batch.items()}
        tokens = int(target_tokens(batch))
        if tokens == 0:  # a chat block cut before its first answer has no loss
            continue
        with context():
            total += causal_lm_loss(model, batch).double().cpu() * tokens
        count += tokens
    model.train(was_training)
    return MeanLoss(float(total) / max(count, 1), count)
