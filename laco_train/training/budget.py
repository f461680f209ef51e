"""The length of a run: optimizer steps until the first of its limits."""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What may end a run; None or -1 is no limit.

    Attributes:
        max_steps: optimizer steps.
        max_epochs: epochs.
        max_tokens: tokens over all devices, padding included.
    """

    max_steps: int | None = None
    max_epochs: int | None = None
    max_tokens: int | None = None


def steps_in_epoch(batches: int, accumulate: int) -> int:
    """Optimizer steps of an epoch of `batches`; those left over at its end make a step too."""
    return -(-batches // accumulate)


def batches_in(steps: int, batches: int, accumulate: int) -> int:
    """Batches of a device that `steps` optimizer steps take, where an epoch has `batches` of them (1 or more)."""
    epochs, rest = divmod(steps, steps_in_epoch(batches, accumulate))
    return epochs * batches + min(rest * accumulate, batches)


def steps_for_tokens(max_tokens: int, batch_tokens: int, batches: int, accumulate: int) -> int:
    """Optimizer steps up to the one that reaches `max_tokens`.

    Args:
        max_tokens: 1 or more.
        batch_tokens: tokens of a batch, over all devices.
        batches: batches of an epoch on a device, 1 or more.
        accumulate: batches of an optimizer step.
    """
    epochs, rest = divmod(-(-max_tokens // batch_tokens), batches)
    return epochs * steps_in_epoch(batches, accumulate) + -(-rest // accumulate)


def run_steps(limits: Limits, batch_tokens: int, batches: int, accumulate: int) -> int | None:
    """Optimizer steps of a run that ends at the first of `limits`; None: it has no end. See `steps_for_tokens`."""
    return min(_steps(limits, batch_tokens, batches, accumulate), default=None)


def _steps(limits: Limits, batch_tokens: int, batches: int, accumulate: int) -> Iterator[int]:
    if limits.max_steps is not None and limits.max_steps > 0:
        yield limits.max_steps
    if limits.max_epochs is not None and limits.max_epochs > 0:
        yield limits.max_epochs * steps_in_epoch(batches, accumulate)
    if limits.max_tokens is not None and batches:  # no batch is never a token
        yield steps_for_tokens(limits.max_tokens, batch_tokens, batches, accumulate)


def steps_at(shares: list[float], steps: int, before: float = 0.0) -> set[int]:
    """Optimizer steps, of a run of `steps`, nearest to these shares of its tokens; 1 or more each.

    Args:
        before: steps' worth of tokens that went before the first step and count in; shares within them are left out.
    """
    wanted = [share * (before + steps) - before for share in shares]
    # 0.07 * 100 is a little above 7
    return {max(1, round(at)) for at in wanted if at > 0}
