"""How a model is wrapped for DDP, and its compiled layers in it."""

import signal
from collections.abc import Callable
from typing import Any, NoReturn

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM

from laco_train.training import ddp
from laco_train.training.ddp import OurDDP, gradients_stay, use_our_ddp
from laco_train.training.layers import arrange_layers
from tests.cli.runs import Result
from tests.distributed.conftest import DATA, DDP, Ranks


@pytest.mark.parametrize("strategy", ["ddp", "auto"])
def test_lightnings_name_for_it_is_ours(strategy: str) -> None:
    use_our_ddp()
    trainer = Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False)
    assert type(trainer.strategy) is OurDDP


@pytest.mark.parametrize(("passed", "buckets"), [({}, 100), ({"bucket_cap_mb": 50}, 50)])
def test_it_is_made_on_the_stream_that_trains(
    monkeypatch: pytest.MonkeyPatch, passed: dict[str, int], buckets: int
) -> None:
    def refused(*_: Any) -> NoReturn:
        raise AssertionError("another stream")

    told: dict[str, Any] = {}
    monkeypatch.setattr(ddp, "DistributedDataParallel", lambda _, **options: told.update(options))
    monkeypatch.setattr(torch.cuda, "Stream", refused)
    strategy = OurDDP(accelerator=CPUAccelerator(), parallel_devices=[torch.device("cpu")], **passed)
    strategy._setup_model(nn.Linear(1, 1))
    assert told == {"device_ids": None, "gradient_as_bucket_view": True, "bucket_cap_mb": buckets}


@pytest.mark.usefixtures("one_rank")
def test_gradients_lie_where_they_are_summed() -> None:
    wrapped = OurDDP(accelerator=CPUAccelerator(), parallel_devices=[torch.device("cpu")])._setup_model(nn.Linear(3, 2))
    wrapped(torch.ones(1, 3)).sum().backward()
    weight, bias = (p.grad for p in wrapped.parameters())
    assert weight is not None and bias is not None
    assert weight.untyped_storage().data_ptr() == bias.untyped_storage().data_ptr()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(("view", "batches", "stay"), [(True, 1, True), (True, 2, False), (False, 1, False)])
def test_whether_gradients_stay_between_steps(view: bool, batches: int, stay: bool) -> None:
    trainer = Trainer(accelerator="cpu", accumulate_grad_batches=batches, logger=False)
    trainer.strategy.model = DistributedDataParallel(nn.Linear(3, 2), gradient_as_bucket_view=view)
    assert gradients_stay(trainer) == stay
    trainer.strategy.model = nn.Linear(3, 2)
    assert not gradients_stay(trainer)


def stopped(ranks: Ranks, *fault: str) -> Result:
    """A fit of two ranks that a callback of faults.py stops; neither exports."""
    callback = [f"--trainer.callbacks+=tests.distributed.faults.{fault[0]}", *fault[1:]]
    result = ranks("fit", "--recipe", "tiny.yaml", *DATA, *DDP, *callback, "--name", fault[0])
    (folder,) = ranks.project.root.glob(f"lightning_logs/{fault[0]}/version_*")
    assert not (folder / "export").exists() and len(list(folder.glob("checkpoints/*"))) == 1
    return result


def test_the_signal_of_another_rank_is_the_one_told(ranks: Ranks) -> None:
    number = f"--trainer.callbacks.number={int(signal.SIGUSR1)}"
    result = stopped(ranks, "TerminatedAt", "--trainer.callbacks.step=2", number)
    assert (result.code, "SIGUSR1: stopped after step 4" in result.out) == (128 + signal.SIGUSR1, True), result.err


def test_a_signal_before_training_is_not_forgotten(ranks: Ranks) -> None:
    """Though validation follows the first step."""
    result = stopped(ranks, "TerminatedEarly")
    assert (result.code, "SIGTERM: stopped after step 2" in result.out) == (128 + signal.SIGTERM, True), result.err


def graphs(model: nn.Module, called: nn.Module, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many graphs the compiled layers of `model` are, when `called` calls it."""
    torch._dynamo.reset()
    counter, compile_ = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, **options: compile_(call, backend=counter, **options))
    arrange_layers(model, compiled=True, recompute=0)
    monkeypatch.undo()
    called(input_ids=torch.arange(12)[None], use_cache=False)
    return counter.frame_count


@pytest.mark.usefixtures("one_rank")
def test_layers_are_not_cut_at_buckets_of_gradients(
    tiny_llama: Callable[..., LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama().train()
    alone = graphs(model, model, monkeypatch)
    wrapped = DistributedDataParallel(model, bucket_cap_mb=0.001)
    assert graphs(model, wrapped, monkeypatch) == alone > 0
