"""The order of training blocks, and a loader that goes on from any batch of it, bit for bit (issue 5, exact resume)."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler


class BlockSampler(Sampler[list[int]]):
    """Batches of block indices, shuffled anew each epoch; an incomplete last batch is left out.

    An epoch here is one time through all blocks. One of the Trainer is shorter under ``limit_train_batches``: the next
    goes on in the order, across its end too, so that all blocks are read and each of its epochs is equally long.

    The order is a function of (seed, epoch) alone. Batch k of an epoch goes to rank k modulo `world`, cut so that all
    ranks get the same number. The position (epoch, next batch of this rank) moves by `advance`, which the consumer
    calls, and not by iterating, which prefetching workers do ahead of it. The position is the same on every rank, so
    rank 0's checkpoint serves all.

    Args:
        blocks: number of blocks.
        batch_size: blocks in a batch.
        seed: any integer.
        rank, world: which of how many processes.
    """

    def __init__(self, blocks: int, batch_size: int, seed: int, rank: int = 0, world: int = 1):
        self.blocks, self.batch_size, self.seed = blocks, batch_size, seed
        self.rank, self.world = rank, world
        self.epoch, self.next = 0, 0

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank, wherever the position is."""
        return self.blocks // self.batch_size // self.world

    def __iter__(self) -> Iterator[list[int]]:
        """As many batches as a whole epoch has, from the current position on."""
        rest = range(self.next, len(self))
        for epoch, batches in ((self.epoch, rest), (self.epoch + 1, range(len(self) - len(rest)))):
            order = self._order(epoch)
            for k in batches:
                start = (k * self.world + self.rank) * self.batch_size
                yield order[start : start + self.batch_size].tolist()

    def _order(self, epoch: int) -> Tensor:
        """All blocks, (blocks,), as that epoch shuffles them."""
        key = hashlib.sha256(f"{self.seed}:{epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big", signed=True))
        return torch.randperm(self.blocks, generator=generator)

    def advance(self) -> None:
        """Move past one batch; past the last one lies the next epoch's first."""
        self.next += 1
        if self.next >= len(self):
            self.epoch, self.next = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """The position: plain integers."""
        return {"epoch": self.epoch, "next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go to a position that `state_dict` gave."""
        self.epoch, self.next = state["epoch"], state["next"]


class BlockLoader(DataLoader[Any]):
    """A DataLoader over a BlockSampler whose state is the sampler's position as the consumer sees it.

    With prefetching workers the state is still the number of batches handed out, and it loads under any number of
    workers. A pass that the consumer leaves early is continued by the next one.
    """

    batch_sampler: BlockSampler

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # DataLoader promises its private iterator class
        for batch in super().__iter__():
            self.batch_sampler.advance()
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The position after the last batch handed out."""
        return self.batch_sampler.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from `state` at the next pass."""
        self.batch_sampler.load_state_dict(state)
