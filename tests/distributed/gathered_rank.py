"""What each of the two processes of test_kept_gathered.py does; a module that they can import."""

import torch
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from laco_train.training.loss import causal_lm_loss
from laco_train.training.parallel import gathered_bytes, keep_gathered, whole
from tests.distributed.test_sharded_layers import some_batch


def model() -> LlamaForCausalLM:
    """The same weights whoever asks."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=96, num_hidden_layers=3, **sizes)).train()


def trained(lm: LlamaForCausalLM) -> list[torch.Tensor]:
    """Losses of three steps, a pass without gradients after each."""
    optimizer = torch.optim.SGD(lm.parameters(), lr=0.5)
    losses = []
    for _ in range(3):
        loss = causal_lm_loss(lm, some_batch())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            losses += [loss.detach(), causal_lm_loss(lm, some_batch())]
    return losses


def on_a_rank(rank: int, meeting: str) -> None:
    """Runs in a process of its own; what fails there fails the test."""
    torch.set_num_threads(1)
    init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    plain, lm = model(), model()
    assert gathered_bytes(plain) == 0
    for layer in lm.model.layers:
        fully_shard(layer)
    fully_shard(lm)
    layers = [p for layer in plain.model.layers for p in layer.parameters()]
    assert gathered_bytes(lm) == 2 * sum(p.numel() * 4 for p in layers)
    first = lm.model.layers[0].mlp.up_proj
    causal_lm_loss(lm, some_batch())
    assert isinstance(first.weight, DTensor)
    keep_gathered(lm)
    loss = causal_lm_loss(lm, some_batch())
    assert not isinstance(first.weight, DTensor)
    loss.backward()
    assert isinstance(first.weight, DTensor)
    lm.zero_grad()
    torch.testing.assert_close(trained(lm), trained(plain), rtol=1e-5, atol=1e-6)
    # the last pass had no gradients, so that layers are whole now; a checkpoint shards them again
    assert not isinstance(first.weight, DTensor)
    saved = get_model_state_dict(lm)
    for name, value in plain.state_dict().items():
        assert isinstance(saved[name], DTensor), name
        torch.testing.assert_close(whole(saved[name]), value, rtol=1e-4, atol=1e-6, msg=name)
    destroy_process_group()
