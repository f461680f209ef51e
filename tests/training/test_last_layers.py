"""The last layers and the head train; nothing below them does, or takes part in the backward pass."""

import copy
from collections.abc import Callable

import pytest
import torch
from transformers import LlamaForCausalLM

from laco_train.errors import InputError
from laco_train.training.last_layers import train_last_layers
from laco_train.training.loss import causal_lm_loss

IDS = torch.arange(20, 44).reshape(2, 12)
BATCH = {"input_ids": IDS, "labels": IDS, "position_ids": torch.arange(12).expand(2, 12)}


def trainable(model: LlamaForCausalLM) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_layers_norm_and_head_train(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    model = tiny_llama(layers=4)
    everything = {name for name, _ in model.named_parameters()}
    train_last_layers(model, 2)
    above = ("model.layers.2.", "model.layers.3.", "model.norm.", "lm_head.")
    assert trainable(model) == {name for name in everything if name.startswith(above)}
    train_last_layers(model, 1)
    assert not any(name.startswith("model.layers.2.") for name in trainable(model))


def test_every_layer_may_train(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    model = tiny_llama(layers=3)
    train_last_layers(model, 3)
    assert {name for name, _ in model.named_parameters()} - trainable(model) == {"model.embed_tokens.weight"}


def test_more_layers_than_are_left(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    model = tiny_llama(layers=3)
    with pytest.raises(InputError, match=r"^model\.last_layers: is 4, but the model has 3 layers left; lower it$"):
        train_last_layers(model, 4)
    assert trainable(model) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
def test_no_graph_below_the_first_that_trains(tiny_llama: Callable[..., LlamaForCausalLM], tied: bool) -> None:
    model = tiny_llama(layers=4, tie_word_embeddings=tied).train()
    train_last_layers(model, 1)
    graphs: list[bool] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, inputs, output: graphs.append(output.grad_fn is not None))
    causal_lm_loss(model, BATCH).backward()
    assert graphs == [False, False, False, True]
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == trainable(model)


def test_tied_head_trains_and_embeddings_get_its_gradient_alone(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    tied = tiny_llama(layers=2, tie_word_embeddings=True)
    apart = tiny_llama(layers=2, tie_word_embeddings=False)
    state = tied.state_dict()
    apart.load_state_dict({name: state[name] for name in apart.state_dict()})
    whole = copy.deepcopy(tied)
    train_last_layers(tied, 1)
    for model in (tied, apart, whole):
        causal_lm_loss(model, BATCH).backward()
    embeddings = tied.get_input_embeddings().weight
    assert embeddings is tied.lm_head.weight
    torch.testing.assert_close(embeddings.grad, apart.lm_head.weight.grad)
    assert not torch.allclose(embeddings.grad, whole.get_input_embeddings().weight.grad)
