"""What layers do to hidden states, and what becomes of the loss without each of them.

Shapes: S samples, T padded tokens, D hidden size, N tokens that count, L layers.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from laco_train.collapse.slots import Removal
from laco_train.collapse.walk import Walk

# Numbers held in float64 at a time: 64 MiB.
_CHUNK = 1 << 23


@torch.no_grad()
def state_cosines(states: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Cosine between the hidden states at the same token, averaged over all tokens, for all pairs of places.

    Args:
        states: (S, T, D) hidden states at each of L + 1 places of the residual stream.
        mask: (S, T), 1 where a token counts.

    Returns:
        (L + 1, L + 1), float64, on the CPU.
    """
    counted = mask.bool()
    rows_ND = [state[counted.to(state.device)] for state in states]
    tokens, size = rows_ND[0].shape
    total = torch.zeros(len(states), len(states), dtype=torch.float64, device=states[0].device)
    step = max(1, _CHUNK // (len(states) * size))
    for start in range(0, tokens, step):
        piece = torch.stack([rows[start : start + step].double() for rows in rows_ND])
        unit = torch.nn.functional.normalize(piece, dim=-1).flatten(1)
        total += unit @ unit.T
    return (total / tokens).cpu()


def block_influence(cosines: Tensor) -> Tensor:
    """(L,) of ShortGPT (arXiv 2403.03853, eq. 1): 1 minus the mean cosine of the states that enter and leave a layer.

    Args:
        cosines: (L + 1, L + 1), see `state_cosines`.
    """
    return 1 - cosines.diagonal(1)


def losses_without_each(walk: Walk) -> Iterator[float]:
    """Calibration loss, nats per token, of the original without layer 0, without layer 1 and so on.

    Each costs the layers after the one removed: the states before it are known.

    Raises:
        InputError: the model's loss can't be had from its final states.
    """
    walk.reset()
    removals = [Removal(index, index + 1) for index in range(walk.decoder.depth)]
    for start in range(0, len(removals), walk.trials_ahead):
        yield from walk.losses(removals[start : start + walk.trials_ahead])
