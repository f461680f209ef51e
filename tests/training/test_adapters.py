"""LoRA: which modules get adapters, and what is refused."""

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaForCausalLM

from laco_train.errors import InputError
from laco_train.settings import LoraSettings
from laco_train.training.adapters import attach_lora
from tests.collapse.tiny import tiny

PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", PROJECTIONS),
        (["all-linear"], PROJECTIONS),
        ("q_proj", {"q_proj"}),
        (["q_proj", "down_proj"], {"q_proj", "down_proj"}),
        (["self_attn.q_proj"], {"q_proj"}),
        (["lm_head"], {"lm_head"}),
    ],
)
def test_targets(tiny_llama: Callable[..., LlamaForCausalLM], targets: str | list[str], expected: set[str]) -> None:
    wrapped = attach_lora(tiny_llama(layers=2), LoraSettings(targets=targets))
    assert {name.rpartition(".")[2] for name in wrapped.targeted_module_names} == expected


@pytest.mark.parametrize("targets", ["query", ["query"], ["q_proj", "query"], ["proj"], ["self_attn"], ["norm"], ["0"]])
def test_target_that_matches_nothing(tiny_llama: Callable[..., LlamaForCausalLM], targets: str | list[str]) -> None:
    missed = targets if isinstance(targets, str) else targets[-1]
    with pytest.raises(InputError, match=f"^model.lora.targets: {missed} matches no module; .*q_proj") as refusal:
        attach_lora(tiny_llama(layers=1), LoraSettings(targets=targets))
    assert "norm" not in str(refusal.value).replace(missed, "")


def test_settings_arrive_and_only_adapters_train(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    model = tiny_llama(layers=2)
    before = model(torch.arange(9)[None]).logits
    wrapped = attach_lora(model, LoraSettings(rank=3, alpha=12, dropout=0.25, targets=["v_proj"]))
    config = wrapped.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 12, 0.25)
    trainable = {name: tuple(p.shape) for name, p in wrapped.named_parameters() if p.requires_grad}
    assert len(trainable) == 4
    assert all(".v_proj.lora_" in name and 3 in shape for name, shape in trainable.items())
    assert torch.equal(wrapped.eval()(torch.arange(9)[None]).logits, before)  # an adapter starts as nothing


@pytest.mark.parametrize("targets", ["embed_tokens", ["q_proj", "model.embed_tokens"]])
def test_an_embedding_that_is_the_head_too(
    tiny_llama: Callable[..., LlamaForCausalLM], targets: str | list[str]
) -> None:
    """Merged, its adapter would change the head as well: another model than the one that trained."""
    with pytest.raises(InputError, match=r"^model.lora.targets: .*embed_tokens is the head too"):
        attach_lora(tiny_llama(layers=1, tie_word_embeddings=True), LoraSettings(targets=targets))
    model = attach_lora(tiny_llama(layers=1, tie_word_embeddings=False), LoraSettings(targets=targets)).eval()
    for name, weights in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(weights)
    trained = model(torch.arange(9)[None]).logits
    torch.testing.assert_close(model.merge_and_unload()(torch.arange(9)[None]).logits, trained)


def test_a_matrix_that_peft_cannot_adapt() -> None:
    with pytest.raises(InputError, match=r"^model.lora.targets: Target module GptOssTopKRouter"):
        attach_lora(tiny("gpt_oss"), LoraSettings(targets=["router"]))
