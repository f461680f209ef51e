"""The order of blocks, and going on from any batch: sampler, loader, a Lightning run, two ranks."""

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import PreTrainedTokenizerFast

from laco_train.settings import DataSettings
from laco_train.training.data import PackedText
from laco_train.training.sampler import BlockSampler

BATCHES = 7  # of an epoch on one rank


def take(sampler: BlockSampler, count: int) -> list[list[int]]:
    """The next `count` batches, consumed one by one, over as many epochs as that takes."""
    taken: list[list[int]] = []
    while len(taken) < count:
        for batch in islice(sampler, count - len(taken)):
            sampler.advance()
            taken.append(batch)
    return taken


SIZES = {
    "blocks": st.integers(12, 40),
    "batch_size": st.integers(1, 4),
    "seed": st.integers(),
    "world": st.integers(1, 3),
}


@given(**SIZES)
def test_ranks_are_disjoint_equal_and_complete(blocks: int, batch_size: int, seed: int, world: int) -> None:
    ranks = [BlockSampler(blocks, batch_size, seed, rank, world) for rank in range(world)]
    shares = [take(sampler, len(sampler)) for sampler in ranks]
    (whole,) = [take(one, len(one)) for one in [BlockSampler(blocks, batch_size, seed)]]
    dealt = [batch for step in zip(*shares, strict=True) for batch in step]
    assert dealt == whole[: len(whole) // world * world]
    seen = [index for batch in whole for index in batch]
    assert len(set(seen)) == len(seen) == blocks // batch_size * batch_size


@given(**SIZES, at=st.integers(0, 30))
def test_a_position_restores_the_order(blocks: int, batch_size: int, seed: int, world: int, at: int) -> None:
    unbroken = BlockSampler(blocks, batch_size, seed, world - 1, world)
    take(unbroken, at)
    state = json.loads(json.dumps(unbroken.state_dict()))
    resumed = BlockSampler(blocks, batch_size, seed, world - 1, world)
    resumed.load_state_dict(state)
    assert take(resumed, 10) == take(unbroken, 10)


@given(**SIZES, at=st.integers(0, 30))
def test_a_pass_is_a_whole_epoch_wherever_it_begins(
    blocks: int, batch_size: int, seed: int, world: int, at: int
) -> None:
    sampler, unbroken = (BlockSampler(blocks, batch_size, seed, world - 1, world) for _ in range(2))
    take(sampler, at)
    order = take(unbroken, at + len(sampler))
    assert list(sampler) == order[at:]  # ahead of the position, as prefetching workers ask
    assert take(sampler, len(sampler)) == order[at:]


def test_epochs_and_seeds_differ() -> None:
    sampler = BlockSampler(blocks=40, batch_size=1, seed=0)
    first, second = take(sampler, 40), take(sampler, 40)
    assert first != second and sorted(first) == sorted(second)
    assert sampler.state_dict() == {"epoch": 2, "next": 0}
    assert take(BlockSampler(40, 1, seed=1), 40) != first
    assert take(BlockSampler(40, 1, seed=0), 40) == first


@pytest.fixture
def packed(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., PackedText]:
    """Factory of modules over the same blocks: 7 batches of 3 on one rank, and blocks left over."""
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} rivers run to the sea, {i * i}."}) + "\n" for i in range(200)))

    def build(**settings: Any) -> PackedText:
        values = {"block_size": 8, "batch_size": 3, "max_tokens": 8 * (3 * BATCHES + 2), **settings}
        return PackedText(DataSettings(train=str(path), **values), lambda: tiny_tokenizer)

    return build


def handed_out(data: PackedText, count: int) -> list[Any]:
    """Ids of the next `count` batches of one loader, over as many passes as that takes."""
    loader, batches = data.train_dataloader(), []
    while len(batches) < count:
        batches += [batch["input_ids"].tolist() for batch in islice(loader, count - len(batches))]
    return batches


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("at", [3, BATCHES, BATCHES + 2])
def test_the_loader_goes_on_where_it_was(packed: Callable[..., PackedText], workers: int, at: int) -> None:
    reference = packed()
    reference.setup("fit")
    unbroken = handed_out(reference, 3 * BATCHES)
    assert len({json.dumps(batch) for batch in unbroken}) == 3 * BATCHES

    first, second = packed(num_workers=workers), packed(num_workers=2 - workers)
    for data in (first, second):
        data.setup("fit")
    loader = first.train_dataloader()
    batches = iter(loader)
    for i in range(at):
        try:
            batch = next(batches)
        except StopIteration:
            batches = iter(loader)
            batch = next(batches)
        assert batch["input_ids"].tolist() == unbroken[i]
    state = loader.state_dict()
    assert state == {"epoch": at // BATCHES, "next": at % BATCHES}
    resumed = second.train_dataloader()
    iter(resumed)  # Lightning makes an iterator before it restores the state
    resumed.load_state_dict(state)
    assert handed_out(second, 3 * BATCHES - at) == unbroken[at:]


class Recorder(LightningModule):
    """A bag-of-tokens model that notes the ids and the loss of each step."""

    def __init__(self, log_file: Path, ask_for_steps: bool = False):
        super().__init__()
        self.table = torch.nn.Embedding(320, 320)
        self.log_file, self.ask_for_steps = log_file, ask_for_steps

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        logits = self.table(batch["input_ids"][:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
        with open(f"{self.log_file}.{self.global_rank}", "a") as file:
            file.write(json.dumps([self.global_step, batch["input_ids"].tolist(), loss.item()]) + "\n")
        return loss

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.ask_for_steps:
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def trainer(folder: Path, ranks: int, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp_fork" if ranks > 1 else "auto",
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)],
        **options,
    )


def recorded(folder: Path, rank: int) -> list[Any]:
    """[step, ids, loss] of each batch that `rank` saw."""
    return [json.loads(line) for line in (folder / f"log.{rank}").read_text().splitlines()]


def train(
    folder: Path, data: PackedText, steps: int, resume: Path | None = None, ranks: int = 1, ask_for_steps: bool = False
) -> list[list[Any]]:
    """Train to `steps` (or 3 epochs, the same) with a checkpoint after each; what each rank recorded."""
    torch.manual_seed(0)
    length: dict[str, Any] = {"max_epochs": 3} if ask_for_steps else {"max_steps": steps}
    trainer(folder, ranks, limit_val_batches=0, **length).fit(
        Recorder(folder / "log", ask_for_steps), datamodule=data, ckpt_path=resume, weights_only=True
    )
    return [recorded(folder, rank) for rank in range(ranks)]


def weights(path: Path) -> torch.Tensor:
    return torch.load(path, weights_only=True)["state_dict"]["table.weight"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ask_for_steps", [False, True])
def test_a_resumed_run_equals_the_unbroken_one(
    tmp_path: Path, packed: Callable[..., PackedText], workers: int, ask_for_steps: bool
) -> None:
    steps = 3 * BATCHES
    options = {"steps": steps, "ask_for_steps": ask_for_steps}
    (tmp_path / "a").mkdir()
    (unbroken,) = train(tmp_path / "a", packed(num_workers=workers), **options)
    assert [step for step, *_ in unbroken] == list(range(steps))
    for at in (3, BATCHES - 1, BATCHES, BATCHES + 1):
        folder = tmp_path / f"b{at}"
        folder.mkdir()
        (resumed,) = train(folder, packed(num_workers=workers), resume=tmp_path / "a" / f"step={at}.ckpt", **options)
        assert resumed == unbroken[at:], f"from step {at}"
        last = f"step={steps}.ckpt"
        assert torch.equal(weights(folder / last), weights(tmp_path / "a" / last))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("limit", [5, 0.75])
def test_short_epochs_are_equally_long_and_read_all(
    tmp_path: Path, packed: Callable[..., PackedText], workers: int, limit: int | float
) -> None:
    """Each has as many batches as trainer.limit_train_batches says, across the end of the order too."""
    steps = 15  # three epochs of five
    options: dict[str, Any] = {"limit_train_batches": limit, "max_epochs": 3, "limit_val_batches": 0}

    def run(name: str, resume: Path | None = None) -> list[Any]:
        (tmp_path / name).mkdir()
        torch.manual_seed(0)
        done = trainer(tmp_path / name, 1, **options)
        done.fit(
            Recorder(tmp_path / name / "log"),
            datamodule=packed(num_workers=workers),
            ckpt_path=resume,
            weights_only=True,
        )
        assert (done.global_step, done.current_epoch) == (steps, 3)
        return recorded(tmp_path / name, 0)

    unbroken = run("a")
    single = packed()
    single.setup("fit")
    assert [ids for _, ids, _ in unbroken] == handed_out(single, steps)
    for at in (3, 5, 6, BATCHES, 8, 10, 2 * BATCHES):
        assert run(f"b{at}", tmp_path / "a" / f"step={at}.ckpt") == unbroken[at:], f"from step {at}"


@pytest.mark.filterwarnings("ignore")
def test_two_ranks_share_an_epoch_and_resume(tmp_path: Path, packed: Callable[..., PackedText]) -> None:
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    per_epoch, steps = BATCHES // 2, 8
    unbroken = train(tmp_path / "a", packed(), steps, ranks=2)
    single = packed()
    single.setup("fit")
    dealt = [ids for pair in zip(*unbroken, strict=True) for _, ids, _ in pair]
    assert dealt[: 2 * per_epoch] == handed_out(single, 2 * per_epoch)
    resumed = train(tmp_path / "b", packed(), steps, resume=tmp_path / "a" / "step=5.ckpt", ranks=2)
    assert resumed == [rank[5:] for rank in unbroken]
    assert torch.equal(weights(tmp_path / "a" / "step=8.ckpt"), weights(tmp_path / "b" / "step=8.ckpt"))


@pytest.mark.filterwarnings("ignore")
def test_validation_is_shared_by_ranks_in_step(tmp_path: Path, packed: Callable[..., PackedText]) -> None:
    data = packed(validation_fraction=0.3, validation_max_tokens=8 * 7)
    trainer(tmp_path, ranks=2).validate(Recorder(tmp_path / "log"), datamodule=data, verbose=False)
    shares = [[ids for _, batch, _ in recorded(tmp_path, rank) for ids in batch] for rank in range(2)]
    single = packed(validation_fraction=0.3, validation_max_tokens=8 * 7)
    single.setup("validate")
    blocks = [block["input_ids"].tolist() for block in single.validation_blocks]
    assert len(blocks) == 7
    assert shares == [blocks[0:6:2], blocks[1:6:2]]
