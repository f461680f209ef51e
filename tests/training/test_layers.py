"""Layers that recompute, and compiled ones, compute the same."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from laco_train.settings import LoraSettings
from laco_train.training.adapters import attach_lora
from laco_train.training.attention import attends_by_documents, set_document_attention
from laco_train.training.layers import arrange_layers, called_plainly
from laco_train.training.loss import base_of

BATCH = {"input_ids": torch.arange(1, 25).reshape(2, 12), "labels": torch.arange(1, 25).reshape(2, 12)}


@pytest.fixture
def model(tiny_llama: Callable[..., LlamaForCausalLM]) -> Callable[[bool], nn.Module]:
    def build(adapted: bool) -> nn.Module:
        torch.manual_seed(0)  # of the adapters
        made = tiny_llama(layers=5)
        return (attach_lora(made, LoraSettings(rank=2)) if adapted else made).train()

    return build


def forwards(model: nn.Module, layers: list[nn.Module]) -> tuple[list[int], dict[str, Tensor]]:
    """How often each layer ran in a step, and the gradients."""
    counts = [0] * len(layers)

    def count(number: int) -> Callable[..., None]:
        def hook(*_: object) -> None:
            counts[number] += 1

        return hook

    handles = [layer.mlp.register_forward_pre_hook(count(n)) for n, layer in enumerate(layers)]  # type: ignore[union-attr,operator,arg-type]
    model(**BATCH, use_cache=False).loss.backward()
    for handle in handles:
        handle.remove()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return counts, gradients


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
def test_the_first_layers_recompute_and_gradients_are_the_same(
    model: Callable[[bool], nn.Module], adapted: bool, compiled: bool
) -> None:
    made = model(adapted)
    layers = list(base_of(made).model.layers)
    once, expected = forwards(made, layers)
    assert once == [1] * 5
    for number in (2, 5, 1, 0):  # fewer than before too
        arrange_layers(made, compiled=compiled, recompute=number)
        with torch.compiler.set_stance("force_eager"):  # compiling takes too long here
            counts, gradients = forwards(made, layers)
        assert counts == [2] * number + [1] * (5 - number)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=1e-6)


def test_nothing_recomputes_without_gradients(model: Callable[[bool], nn.Module]) -> None:
    made = model(False)
    expected = made(**BATCH, use_cache=False).loss.item()
    arrange_layers(made, compiled=False, recompute=5)
    with torch.no_grad():
        assert made(**BATCH, use_cache=False).loss.item() == expected
    counts, _ = forwards(made.eval(), list(made.model.layers))  # type: ignore[union-attr,arg-type]
    assert counts == [1] * 5


def test_dropout_is_drawn_again_alike(model: Callable[[bool], nn.Module]) -> None:
    made = model(False)
    for layer in made.model.layers:  # type: ignore[union-attr,operator]
        layer.self_attn.attention_dropout = 0.5
    found = []
    for number in (0, 5):
        arrange_layers(made, compiled=False, recompute=number)
        torch.manual_seed(3)
        found.append(forwards(made, list(made.model.layers))[1])  # type: ignore[union-attr,arg-type]
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-6, atol=1e-6)


def test_default_dtype_is_that_of_the_forward_pass(model: Callable[[bool], nn.Module]) -> None:
    made, seen = model(False), []
    arrange_layers(made, compiled=False, recompute=5)
    first = made.model.layers[0]  # type: ignore[union-attr,index]
    first.mlp.register_forward_pre_hook(lambda *_: seen.append(torch.get_default_dtype()))
    torch.set_default_dtype(torch.bfloat16)
    try:
        loss = made(**BATCH, use_cache=False).loss
    finally:
        torch.set_default_dtype(torch.float32)
    loss.backward()
    assert seen == [torch.bfloat16] * 2
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("recompute", [0, 2])
def test_compiling_leaves_names_alone_and_can_be_undone(model: Callable[[bool], nn.Module], recompute: int) -> None:
    made = model(True)
    names, layers = list(made.state_dict()), list(base_of(made).model.layers)
    arrange_layers(made, compiled=True, recompute=recompute)
    assert list(made.state_dict()) == names
    assert all(layer._compiled_call_impl is not None for layer in layers)
    arrange_layers(made, compiled=False, recompute=0)
    assert all(layer._compiled_call_impl is None for layer in layers)


@pytest.mark.parametrize("adapted", [False, True])
def test_called_plainly_for_a_while(model: Callable[[bool], nn.Module], adapted: bool) -> None:
    made = model(adapted).eval()
    layers, ids = list(base_of(made).model.layers), torch.arange(1, 12)[None]
    expected = made(input_ids=ids).logits
    arrange_layers(made, compiled=True, recompute=2)
    set_document_attention(made, True)
    calls = [layer._compiled_call_impl for layer in layers]
    with pytest.raises(ZeroDivisionError), called_plainly(made):
        assert torch.equal(made(input_ids=ids).logits, expected)  # by documents it would ask for masks
        assert all(layer._compiled_call_impl is None for layer in layers)
        _ = 1 / 0
    assert [layer._compiled_call_impl for layer in layers] == calls
    assert attends_by_documents(made)
