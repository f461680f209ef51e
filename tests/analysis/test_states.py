"""Hidden states, block influence and losses without a layer, against the plain model."""

import copy
from collections.abc import Callable

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from laco_train.analysis import states
from laco_train.analysis.states import block_influence, losses_without_each, state_cosines
from laco_train.collapse.decoder import decoder_of, keep_layers
from laco_train.collapse.similarity import calibration_batch
from laco_train.collapse.walk import Walk
from laco_train.settings import CollapseSettings
from tests.collapse.helpers import TEXTS, scramble, token_ids


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    return scramble(tiny_llama(layers=5), seed=2)


@pytest.fixture(scope="module")
def walk(model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase) -> Walk:
    return Walk(decoder_of(model), calibration_batch(tiny_tokenizer, TEXTS), CollapseSettings(layers_per_merge=2))


@torch.no_grad()
def slow_states(model: LlamaForCausalLM, ids: torch.Tensor) -> list[torch.Tensor]:
    """What enters each layer and what leaves the last, [tokens, hidden] each, one sample alone, by hooks."""
    found: list[torch.Tensor] = []
    handles = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: found.append((args or [kwargs["hidden_states"]])[0][0]), with_kwargs=True
        )
        for layer in model.model.layers
    ]
    handles.append(model.model.norm.register_forward_pre_hook(lambda _, args: found.append(args[0][0])))
    model(input_ids=ids[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("chunk", [1 << 23, 700])
def test_cosines_are_means_over_tokens(
    model: LlamaForCausalLM,
    walk: Walk,
    tiny_tokenizer: PreTrainedTokenizerBase,
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(states, "_CHUNK", chunk)
    found = state_cosines(walk.states(), walk.mask)
    samples = [slow_states(model, ids) for ids in token_ids(tiny_tokenizer, TEXTS)]
    assert found.shape == (6, 6)
    for i in range(6):
        for j in range(6):
            cosines = [
                float(torch.cosine_similarity(a.double(), b.double(), dim=0))
                for sample in samples
                for a, b in zip(sample[i], sample[j], strict=True)
            ]
            assert found[i, j].item() == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)
    assert block_influence(found).tolist() == [1 - found[i, i + 1].item() for i in range(5)]


@torch.no_grad()
def test_losses_are_those_of_models_that_lack_the_layer(
    model: LlamaForCausalLM, walk: Walk, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    found = list(losses_without_each(walk))
    assert len(found) == 5
    for index, loss in enumerate(found):
        lacking = copy.deepcopy(model)
        keep_layers(decoder_of(lacking), [layer for layer in range(5) if layer != index])
        total, count = 0.0, 0
        for ids in token_ids(tiny_tokenizer, TEXTS):
            logits = lacking(input_ids=ids[None], use_cache=False).logits[0].double()
            for position in range(len(ids) - 1):
                total -= float(torch.log_softmax(logits[position], dim=0)[ids[position + 1]])
                count += 1
        assert loss == pytest.approx(total / count, abs=1e-4)
