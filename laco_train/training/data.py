"""Packed text as a LightningDataModule: packed and cached once, ordered by BlockSampler, resumed to the bit."""

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

import datasets
import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from laco_train.errors import InputError
from laco_train.settings import DataSettings
from laco_train.training.cache import Request, Selection, Summary, open_packed
from laco_train.training.sampler import BlockLoader, BlockSampler
from laco_train.training.sources import HubSet, Source, cut_finely, resolve


def collate(blocks: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Blocks to a batch: input_ids, labels and position_ids, int64, (batch, block_size) each."""
    rows = list(blocks)
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])).long() for name in rows[0]}


class PackedText(LightningDataModule):
    """Blocks of `settings.block_size` tokens for training and validation.

    Documents of a block are isolated by position_ids alone: call the model with ``use_cache=False`` and no mask, and
    the Trainer with ``use_distributed_sampler=False``, as batches are dealt out to ranks here.

    Attributes:
        train_blocks, validation_blocks: datasets with columns input_ids, labels, position_ids; there after `setup`.
    """

    train_blocks: datasets.Dataset
    validation_blocks: datasets.Dataset

    def __init__(self, settings: DataSettings, tokenizer: Callable[[], PreTrainedTokenizerBase]):
        super().__init__()
        self.settings = settings
        self._tokenizer = tokenizer
        self._sampler: BlockSampler | None = None
        self._summaries: dict[str, Summary] = {}
        self._look_up: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None

    def prepare_data(self) -> None:
        """Read, tokenise and pack what is not in the cache; Lightning calls it on one process of each machine."""
        self._open()

    def setup(self, stage: str | None = None) -> None:
        """Open the packed sets (packing them if `prepare_data` was not called) and start at epoch 0, batch 0.

        Raises:
            InputError: bad data (see `laco_train.training.cache`), or fewer blocks than a batch on each device.
        """
        self._open()
        rank, world = self._place()
        self._sampler = BlockSampler(
            len(self.train_blocks), self.settings.batch_size, self.settings.seed, rank=rank, world=world
        )
        if len(self._sampler) == 0:
            raise InputError(
                "data.batch_size",
                f"{len(self.train_blocks)} blocks make no batch of {self.settings.batch_size} for each of {world} "
                "devices; lower it, name more text or lower data.block_size",
            )
        if len(self.validation_blocks) < world:
            raise InputError(
                "data.validation",
                f"holds {len(self.validation_blocks)} blocks, fewer than {world} devices; name more text",
            )

    def train_dataloader(self) -> BlockLoader:
        """Shuffled batches of this rank; its state is the position in the order."""
        return BlockLoader(
            self.train_blocks,
            batch_sampler=self.sampler,
            num_workers=self.settings.num_workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Every `world`-th block in order; up to world - 1 at the end are left out, so that ranks keep in step."""
        rank, world = self._place()
        return self._in_order(range(rank, len(self.validation_blocks) // world * world, world))

    def all_validation(self) -> DataLoader[Any]:
        """The blocks that `val_dataloader` gives on all ranks together, for one process that measures alone."""
        world = self._place()[1]
        return self._in_order(range(len(self.validation_blocks) // world * world))

    def _in_order(self, share: range) -> DataLoader[Any]:
        return DataLoader(
            self.validation_blocks.select(share),
            batch_size=self.settings.batch_size,
            num_workers=self.settings.num_workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
        )

    def leading(self, blocks: int, batch_size: int) -> list[dict[str, Tensor]]:
        """The `blocks` that the first epoch begins with, or all of them, in whole batches."""
        order = itertools.islice(
            BlockSampler(len(self.train_blocks), batch_size, self.settings.seed), max(1, blocks // batch_size)
        )
        return [collate(self.train_blocks.select(batch)) for batch in order]

    def accompany(self, look_up: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
        """Give training batches a row ``indices`` (batch,) of their blocks, and let `look_up` put in its place what is
        known about those; called once, after `setup`."""
        self.train_blocks = self.train_blocks.add_column("indices", range(len(self.train_blocks)))
        self._look_up = look_up

    def on_before_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        """Look up while the indices are on the CPU, and after a -true precision has cast what the loader gave."""
        return batch if self._look_up is None or "indices" not in batch else self._look_up(batch)

    @property
    def sampler(self) -> BlockSampler:
        """Order of, and position in, the training blocks; there after `setup`."""
        if self._sampler is None:
            raise RuntimeError("PackedText has no sampler before setup()")
        return self._sampler

    @property
    def batches_per_epoch(self) -> int:
        """Training batches of an epoch on each rank."""
        return len(self.sampler)

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens (padding included) that an epoch trains on over all ranks."""
        return len(self.sampler) * self.sampler.world * self.settings.batch_size * self.settings.block_size

    def summary(self) -> dict[str, dict[str, Any]]:
        """For train and validation: documents, tokens, blocks, duplicates, skipped, sha256 (see `Summary`)."""
        return {
            role: {name: value for name, value in asdict(summary).items() if name != "digests"}
            for role, summary in self._summaries.items()
        }

    def state_dict(self) -> dict[str, int]:
        """The position in the training order; kept here too, as Lightning drops a loader's state if
        `Trainer.estimated_stepping_batches` was read before the checkpoint is restored."""
        return self.sampler.state_dict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from a position in the training order."""
        self.sampler.load_state_dict(state_dict)

    def _place(self) -> tuple[int, int]:
        """(rank, number of processes)."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _open(self) -> None:
        if len(self._summaries) == 2:
            return
        s = self.settings
        train = resolve("data.train", s.train)
        own = None if s.validation is None else resolve("data.validation", s.validation)
        _check_bounds(s, train, train if own is None else own)
        if own is None:  # else documents that both hold would no longer be alike
            train = cut_finely(train)
        tokenizer = self._tokenizer()
        if tokenizer.eos_token_id is None:
            raise InputError("model.source", "its tokenizer has no end-of-text token; set eos_token in its config")
        if s.format == "chat" and not tokenizer.chat_template:
            raise InputError(
                "data.format", "chat needs a tokenizer with a chat template; use an instruct model or text"
            )

        def packed(key: str, sources: list[Source], max_tokens: int | None, selection: Selection) -> datasets.Dataset:
            chat = s.format == "chat"
            column = "messages" if chat and s.column == "text" else s.column
            request = Request(key, sources, column, chat, s.block_size, max_tokens, selection)
            blocks, self._summaries[key.removeprefix("data.")] = open_packed(request, tokenizer)
            return blocks.with_format("numpy")

        fraction = s.validation_fraction if own is None else None
        if own is None:  # train first: an empty or broken file is to be blamed on data.train
            self.train_blocks = packed("data.train", train, s.max_tokens, Selection(fraction, swept=s.sweep_fraction))
        held_out = Selection(fraction, held_out=own is None)
        self.validation_blocks = packed("data.validation", own or train, s.validation_max_tokens, held_out)
        known = frozenset() if own is None else frozenset(self._summaries["validation"].digests)
        if own is not None:
            rest = Selection(excluded=known, swept=s.sweep_fraction)
            self.train_blocks = packed("data.train", train, s.max_tokens, rest)
        if s.validate_on == "sweep":
            swept = Selection(fraction, excluded=known, swept=s.sweep_fraction, sweeps=True)
            self.validation_blocks = packed("data.validation", train, s.validation_max_tokens, swept)


def _check_bounds(s: DataSettings, train: list[Source], validation: list[Source]) -> None:
    """A hub set is streamed and may have no end in sight, and a .txt file holds no conversations."""
    for key, sources, limit in (
        ("data.max_tokens", train, s.max_tokens),
        ("data.validation_max_tokens", validation, s.validation_max_tokens),
    ):
        if limit is None and any(isinstance(source, HubSet) for source in sources):
            raise InputError(key, "is null, but a hub data set is streamed until a number of tokens; give one")
    for source in (*train, *validation):
        if s.format == "chat" and not isinstance(source, HubSet) and source.path.name.endswith(".txt"):
            raise InputError("data.format", f"chat needs a messages column, and {source.path} is plain text; use JSONL")
