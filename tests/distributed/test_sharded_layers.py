"""Compiled and recomputing layers, and the loss without logits, on a sharded model: losses and gradients stay."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from transformers import LlamaForCausalLM

from laco_train.training.fused import fused_loss
from laco_train.training.layers import arrange_layers
from laco_train.training.loss import Batch, causal_lm_loss
from laco_train.training.parallel import whole


def some_batch() -> Batch:
    ids = torch.randint(0, 90, (2, 24), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids, "position_ids": torch.arange(24).remainder(10).expand(2, 24)}


def gradients(model: LlamaForCausalLM, loss: Callable[[LlamaForCausalLM, Batch], Tensor]) -> dict[str, Tensor]:
    """Of each weight, after two passes, as gradients are added up; beside them the loss."""
    for _ in range(2):
        value = loss(model, some_batch())
        value.backward()
    found = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "loss": value.detach()}


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("recompute", [0, 3])
def test_sharded_model_gives_the_same(recompute: int, tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    plain, sharded = tiny_llama().train(), tiny_llama().train()
    expected = gradients(plain, causal_lm_loss)
    for layer in sharded.model.layers:
        fully_shard(layer)
    fully_shard(sharded)
    arrange_layers(sharded, compiled=True, recompute=recompute)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found = gradients(sharded, fused_loss)
    # one for all layers, and one for a slice of the loss
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert "forward" not in vars(sharded)
