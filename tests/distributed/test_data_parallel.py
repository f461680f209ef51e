"""How a model is wrapped for DDP, and its compiled layers in it."""

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
from laco_train.training.ddp import OurDDP, use_our_ddp
from laco_train.training.layers import arrange_layers


@pytest.mark.parametrize("strategy", ["ddp", "auto"])
def test_lightnings_name_for_it_is_ours(strategy: str) -> None:
    use_our_ddp()
    trainer = Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False)
    assert type(trainer.strategy) is OurDDP


def made(monkeypatch: pytest.MonkeyPatch, device: str, **passed: Any) -> dict[str, Any]:
    """What DDP is told by a strategy with `passed` on `device`."""

    def refused(*_: Any) -> NoReturn:
        raise AssertionError("another stream")

    told: dict[str, Any] = {}
    monkeypatch.setattr(ddp, "DistributedDataParallel", lambda _, **options: told.update(options))
    monkeypatch.setattr(torch.cuda, "Stream", refused)
    OurDDP(accelerator=CPUAccelerator(), parallel_devices=[torch.device(device)], **passed)._setup_model(
        nn.Linear(1, 1)
    )
    return told


def test_it_is_made_on_the_stream_that_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    assert made(monkeypatch, "cpu") == {"device_ids": None, "gradient_as_bucket_view": True}


@pytest.mark.parametrize(("rate", "buckets"), [(25e9, {}), (300e9, {"bucket_cap_mb": 512})])
def test_buckets_are_large_where_the_link_is_fast(
    monkeypatch: pytest.MonkeyPatch, rate: float, buckets: dict[str, int]
) -> None:
    monkeypatch.setattr(ddp, "summed_per_second", lambda _: rate)
    options = {"device_ids": [0], "gradient_as_bucket_view": True}
    assert made(monkeypatch, "cuda:0") == {**options, **buckets}
    assert made(monkeypatch, "cuda:0", bucket_cap_mb=50) == {**options, "bucket_cap_mb": 50}


@pytest.mark.usefixtures("one_rank")
def test_gradients_lie_where_they_are_summed() -> None:
    wrapped = OurDDP(accelerator=CPUAccelerator(), parallel_devices=[torch.device("cpu")])._setup_model(nn.Linear(3, 2))
    wrapped(torch.ones(1, 3)).sum().backward()
    weight, bias = (p.grad for p in wrapped.parameters())
    assert weight is not None and bias is not None
    assert weight.untyped_storage().data_ptr() == bias.untyped_storage().data_ptr()


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
