"""What Lightning does about signals in training is replaced; runs that are stopped: tests/cli/test_resume_auto.py."""

import inspect
import signal
from typing import Any, NoReturn

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop

from laco_train.callbacks.preemption import SIGNALS, StopOnSignal


def started(trainer: Trainer) -> StopOnSignal:
    callback = StopOnSignal()
    callback.on_fit_start(trainer, LightningModule())
    return callback


def test_ranks_are_not_asked_before_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("the host would wait for the device")

    name = "_broadcast_sigterm_tensor"  # private; of another name, Lightning would ask again
    assert f"self.{name}()" in inspect.getsource(_TrainingEpochLoop.advance)
    trainer = Trainer(accelerator="cpu", logger=False)
    started(trainer)
    monkeypatch.setattr(torch, "tensor", refused)
    getattr(trainer.fit_loop.epoch_loop, name)()


def test_handlers_are_ours_from_the_moment_that_lightning_registers_its_own() -> None:
    assert "self._signal_connector.register_signal_handlers()" in inspect.getsource(Trainer._run)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    trainer = Trainer(accelerator="cpu", logger=False)
    callback = started(trainer)
    trainer._signal_connector.register_signal_handlers()
    try:
        for number in SIGNALS:
            signal.raise_signal(number)
            assert callback.received == number and not trainer.received_sigterm
    finally:
        trainer._signal_connector.teardown()
    assert {number: signal.getsignal(number) for number in SIGNALS} == before
