"""The copy holds the model's weights and nothing that training hung on it."""

import copy
import types
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from laco_train.export import cpu_copy

IDS = torch.arange(1, 20).unsqueeze(0)
Factory = Callable[..., tuple]


def test_weights_are_cast_and_float_buffers_are_not(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    model = tiny_llama()
    duplicate = cpu_copy(model, torch.bfloat16)
    for (name, ours), (other, theirs) in zip(model.named_parameters(), duplicate.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(theirs, ours.detach().to(torch.bfloat16))
    assert {buffer.dtype for buffer in duplicate.buffers()} == {torch.float32}


@pytest.mark.parametrize("tied", [True, False])
def test_ties_stay(tiny_llama: Callable[..., LlamaForCausalLM], tied: bool) -> None:
    duplicate = cpu_copy(tiny_llama(tie_word_embeddings=tied), torch.bfloat16)
    assert (duplicate.lm_head.weight is duplicate.model.embed_tokens.weight) is tied


def test_copy_shares_no_memory_with_the_model(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    for tensor in (*(duplicate := cpu_copy(model, torch.float32)).parameters(), *duplicate.buffers()):
        tensor.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.model.rotary_emb.inv_freq.abs().sum() > 0


class Recorder:
    """Stands for a trainer: a hook bound to it must not drag it into the copy."""

    def __init__(self) -> None:
        self.calls = 0

    def __deepcopy__(self, memo: dict) -> "Recorder":
        raise AssertionError("the trainer was copied")

    def note(self, *_: object) -> None:
        self.calls += 1


def test_hooks_gradients_and_patches_stay_behind(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    model, recorder = tiny_llama(), Recorder()
    expected = model(IDS).logits.detach()
    model.train()
    model.enable_input_require_grads()
    for layer in model.model.layers:
        layer.register_forward_hook(recorder.note)
        layer.register_full_backward_hook(recorder.note)
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    model.model.norm.forward = types.MethodType(lambda self, hidden: hidden * 0, model.model.norm)
    model.model.stash = model.lm_head.weight * 2  # not a leaf, which deepcopy alone refuses
    calls = recorder.calls
    assert calls > 0

    duplicate = cpu_copy(model, torch.float32)
    assert torch.equal(duplicate(IDS).logits, expected)
    assert recorder.calls == calls
    assert not any(module.training for module in duplicate.modules())
    assert not any(p.requires_grad or p.grad is not None for p in duplicate.parameters())


@pytest.mark.parametrize("where", ["model", "layers", "in place"])
def test_compiled_models_copy_as_plain_ones(tiny_llama: Callable[..., LlamaForCausalLM], where: str) -> None:
    model: nn.Module = tiny_llama()
    expected, names = model(IDS).logits.detach(), list(model.state_dict())
    if where == "model":
        model = torch.compile(model, backend="eager")
    elif where == "layers":
        for index, layer in enumerate(model.model.layers):
            model.model.layers[index] = torch.compile(layer, backend="eager")
    else:
        model.compile(backend="eager")
    duplicate = cpu_copy(model, torch.float32)
    assert list(duplicate.state_dict()) == names
    assert torch.equal(duplicate(IDS).logits, expected)


@pytest.mark.parametrize("tied", [True, False])
def test_lora_is_merged(adapted: Factory, tied: bool) -> None:
    model, _ = adapted(tie_word_embeddings=tied)
    with model.disable_adapter():
        base = model(IDS).logits
    duplicate = cpu_copy(model, torch.float32)
    assert type(duplicate) is LlamaForCausalLM
    assert not any("lora" in name for name in duplicate.state_dict())
    assert (model(IDS).logits - base).abs().max() > 0.1
    torch.testing.assert_close(duplicate(IDS).logits, model(IDS).logits, rtol=0, atol=1e-4)


def test_lora_is_merged_in_float32_and_rounded_once(adapted: Factory) -> None:
    model, _ = adapted(dtype=torch.bfloat16)
    duplicate = cpu_copy(model, torch.bfloat16)
    query = model.base_model.model.model.layers[0].self_attn.q_proj
    low_a, low_b = (getattr(query, name)["default"].weight.detach().float() for name in ("lora_A", "lora_B"))
    exact = query.base_layer.weight.detach().float() + query.scaling["default"] * (low_b @ low_a)
    assert torch.equal(duplicate.model.layers[0].self_attn.q_proj.weight, exact.to(torch.bfloat16))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_copy_of_a_model_on_a_gpu_takes_no_gpu_memory(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    model = tiny_llama().cuda()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    duplicate = cpu_copy(model, torch.float32)
    assert torch.cuda.max_memory_allocated() == before
    assert {tensor.device.type for tensor in (*duplicate.parameters(), *duplicate.buffers())} == {"cpu"}
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cuda"}
    assert torch.equal(duplicate.lm_head.weight, model.lm_head.weight.cpu())
