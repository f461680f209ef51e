"""Python's search for garbage in training."""

import gc
from collections.abc import Iterator

import pytest
from lightning.pytorch import LightningModule, Trainer

from laco_train.callbacks.garbage import FreezeGarbage


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
