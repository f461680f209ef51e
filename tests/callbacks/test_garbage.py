"""Python's search for garbage in training."""

import gc
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

from laco_train.callbacks.garbage import FreezeGarbage
from tests.cli.runs import Project


class Look(Callback):
    """Notes at each batch how many objects are left out."""

    seen: ClassVar[list[int]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """The first batch has frozen nothing yet."""
        self.seen.append(gc.get_freeze_count())


def test_a_fit_leaves_out_what_is_there_and_gives_it_back(project: Project) -> None:
    Look.seen.clear()
    project.fit(f"--trainer.callbacks+={__name__}.Look", "--trainer.max_steps", "3", "--export.enabled", "false")
    first, *others = Look.seen
    assert first == 0 and len(others) == 2 and min(others) > 100_000
    assert gc.get_freeze_count() == 0


@pytest.fixture
def thawed() -> Iterator[None]:
    """Whatever a test froze."""
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("thawed")
def test_what_is_there_after_the_first_batch_is_left_out_until_the_end() -> None:
    trainer, module, callback = Trainer(accelerator="cpu", logger=False), LightningModule(), FreezeGarbage()
    before = [object]
    callback.on_train_batch_end(trainer, module, None, {}, 0)
    after = [object]
    frozen = gc.get_freeze_count()
    searched = {id(each) for each in gc.get_objects()}
    assert id(before) not in searched and id(after) in searched
    callback.on_train_batch_end(trainer, module, None, {}, 1)
    assert gc.get_freeze_count() == frozen
    callback.on_fit_end(trainer, module)
    assert gc.get_freeze_count() == 0


@pytest.mark.usefixtures("thawed")
def test_after_an_exception_too() -> None:
    trainer, module, callback = Trainer(accelerator="cpu", logger=False), LightningModule(), FreezeGarbage()
    callback.on_train_batch_end(trainer, module, None, {}, 0)
    assert gc.get_freeze_count() > 0
    callback.on_exception(trainer, module, RuntimeError())
    assert gc.get_freeze_count() == 0
