"""Models that can't be collapsed safely: each refused before anything is touched, in a line that says what to do."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from laco_train.collapse import decoder_of
from laco_train.collapse.families import depth_of
from laco_train.errors import InputError
from tests.collapse.tiny import BREAKING, COMMON, DEPTH, HEADS, LLAMA, TINY, assert_sound, collapsed, logits, tiny


def unlisted(model: PreTrainedModel) -> PreTrainedModel:
    model.config.model_type = "unlisted"
    return model


def two_stacks() -> PreTrainedModel:
    model = unlisted(tiny("llama"))
    model.model.extra = nn.ModuleList([nn.Linear(2, 2) for _ in range(DEPTH)])
    return model


def two_norms() -> PreTrainedModel:
    model = unlisted(tiny("llama"))
    model.model.other_norm = copy.deepcopy(model.model.norm)
    return model


def unknown_list() -> PreTrainedModel:
    model = unlisted(tiny("llama"))
    model.config.rope_theta_by_layer = [1.0] * DEPTH
    return model


DOUBTFUL = {
    "two stacks of one depth": (two_stacks, "2 stacks that could be its 6 decoder layers"),
    "two norms": (two_norms, "2 norms"),
    "a list of which nothing is known": (unknown_list, "rope_theta_by_layer may or may not follow"),
    "no stack of that depth": (
        lambda: unlisted(tiny("llama", num_hidden_layers=4)).apply(
            lambda module: module.layers.append(nn.Linear(2, 2)) if hasattr(module, "layers") else None
        ),
        "0 stacks",
    ),
    # DiffLlama derives a constant from the index; DeepSeek keeps the first layers dense
    "constants by position": (
        lambda: tiny("diffllama", **LLAMA),
        r"depend on their position \(self_attn\.lambda_init",
    ),
    "attention scaled by position": (
        lambda: tiny("gpt2", **TINY["gpt2"], scale_attn_by_inverse_layer_idx=True),
        r"depend on their position \(attn\.scaling",
    ),
    "the first layers without experts": (
        lambda: tiny(
            "glm4_moe", **HEADS, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_group=1
        ),
        "depend on their position",
    ),
}


@pytest.mark.parametrize("case", DOUBTFUL)
def test_doubtful_models_are_refused(case: str, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    build, reason = DOUBTFUL[case]
    with pytest.raises(InputError, match=reason) as error:
        collapsed(build(), tiny_tokenizer)
    assert error.value.key == "model.source"
    assert "use a family that the README lists" in str(error.value)
    assert "\n" not in str(error.value)


# kinds that are refused

TEXT: dict[str, Any] = {**COMMON, **HEADS}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "encoder-decoder": ("t5", {}, "encoder-decoder model; use a decoder-only"),
    "encoder-decoder, BART": ("bart", {}, "encoder-decoder model; use a decoder-only"),
    "vision and language": ("gemma3", {}, "wraps a text model.*from_config"),
    "vision and language, LLaVA": ("llava", {}, "wraps a text model.*from_config"),
    "shared keys and values": ("gemma3n_text", {}, "keys and values from others.*use a model"),
    "Jamba": ("jamba", {}, "hybrid or recurrent model.*use one"),
    "LFM2": ("lfm2", {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}, "hybrid.*use one"),
    "Qwen3-Next": ("qwen3_next", {}, "hybrid.*use one"),
    "Falcon-H1": ("falcon_h1", {}, "hybrid.*use one"),
    "Mamba": ("mamba", {}, "hybrid or recurrent.*use one"),
    "quantised": ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised.*the original"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_config_alone(case: str) -> None:
    kind, values, reason = REFUSED[case]
    with pytest.raises(InputError, match=reason) as error:
        depth_of(CONFIG_MAPPING[kind](**values))
    assert error.value.key == "model.source"
    assert "\n" not in str(error.value)


def test_recurrent_layers_that_no_config_names() -> None:
    model = tiny("rwkv", attention_hidden_size=32)
    with pytest.raises(InputError, match=r"hybrid or recurrent model.*Rwkv"):
        decoder_of(model)


def test_text_model_out_of_a_wrapper(tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """What the refusal tells to do works."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={**TEXT, **TINY["gemma3_text"]}, vision_config={**vision, "image_size": 28, "patch_size": 14}
    )
    wrapper = Gemma3ForConditionalGeneration(config).eval()
    with pytest.raises(InputError, match="wraps a text model \\(gemma3_text\\)"):
        decoder_of(wrapper)
    text = AutoModelForCausalLM.from_config(wrapper.config.text_config).eval()
    text.model, text.lm_head = wrapper.model.language_model, wrapper.lm_head
    torch.testing.assert_close(logits(text), logits(wrapper))
    text.generation_config.max_new_tokens = 7
    collapsed(text, tiny_tokenizer, remove=BREAKING)
    assert_sound(text, tmp_path, DEPTH - len(BREAKING))
