"""A tiny random model of each family, and what must hold for each once layers are gone."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from laco_train.collapse import CollapsePlan, Decoder, collapse_model, decoder_of
from laco_train.settings import CollapseSettings, LoraSettings
from laco_train.training.adapters import attach_lora
from tests.collapse import standins
from tests.collapse.helpers import TEXTS, scramble

Json = dict[str, Any]
DEPTH = 6
WINDOW = 8  # shorter than the sequences, so that sliding and full attention differ
COMMON: Json = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "pad_token_id": 1,
    "bos_token_id": None,
    "eos_token_id": 0,
}
LLAMA: Json = {"intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 256}
HEADS: Json = {**LLAMA, "head_dim": 8}
SLIDING: Json = {"sliding_window": WINDOW}
MOE: Json = {"num_experts_per_tok": 2, "num_local_experts": 4}
# What each adds to COMMON. Layer types are left to each config's own pattern, which a deletion then breaks.
TINY: dict[str, Json] = {
    "llama": LLAMA,
    "mistral": {**HEADS, **SLIDING},
    "mixtral": {**LLAMA, **MOE},
    "qwen2": {**LLAMA, **SLIDING, "use_sliding_window": True, "max_window_layers": 3},
    "qwen3": {**HEADS, **SLIDING, "use_sliding_window": True, "max_window_layers": 3},
    "qwen3_moe": {
        **HEADS,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "decoder_sparse_step": 2,  # layers 1, 3 and 5 hold experts,
        "mlp_only_layers": [3],  # less layer 3
    },
    "gemma2": {**HEADS, **SLIDING},
    "gemma3_text": {**HEADS, **SLIDING, "sliding_window_pattern": 3},
    "phi3": {**LLAMA, **SLIDING},
    "smollm3": LLAMA,
    "olmo2": LLAMA,
    "cohere2": {**LLAMA, **SLIDING},
    "gpt_oss": {
        **HEADS,
        **SLIDING,
        **MOE,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "gpt2": {"n_positions": 256, "n_inner": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neox": {"intermediate_size": 64, "max_position_embeddings": 256},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 256, "dropout": 0.0},
    "falcon": {"ffn_hidden_size": 64, "max_position_embeddings": 256},
    "baichuan": LLAMA,
    "internlm2": LLAMA,
}
# Every window of two layers is kept: six layers become four, then three.
EVERY_WINDOW = CollapseSettings(layers_per_merge=2, similarity_threshold=-1.0, mixed_types="first", calibration=TEXTS)
BREAKING = [1, 4]  # leaves layers 0, 2, 3 and 5, of which no pattern above makes the right types
STANDINS = {"baichuan": standins.BaichuanForCausalLM, "internlm2": standins.InternLM2ForCausalLM}


def tiny(kind: str, **overrides: Any) -> PreTrainedModel:
    """A random model of six layers, float32, eval mode; an unlisted `kind` needs every entry in `overrides`."""
    values = {**COMMON, **TINY.get(kind, {}), **overrides}
    if kind in STANDINS:
        model = STANDINS[kind](STANDINS[kind].config_class(**values))
    else:
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**values), dtype=torch.float32)
    model.generation_config = GenerationConfig(max_new_tokens=7, eos_token_id=0, pad_token_id=1)
    return scramble(model, seed=3).eval()


def collapsed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> CollapsePlan:
    """Collapse `model` in place, by EVERY_WINDOW with `changes`."""
    return collapse_model(model, tokenizer, dataclasses.replace(EVERY_WINDOW, **changes))[1]


def ids(length: int = 3 * WINDOW) -> Tensor:
    """(2, length) tokens, none of them special."""
    return torch.randint(4, 320, (2, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """(2, T, V), without a cache."""
    return model(input_ids=ids(), use_cache=False).logits


def assert_sound(model: PreTrainedModel, folder: Path, depth: int) -> None:
    """`model` has `depth` layers, numbered anew, and reloads as itself, with and without a cache."""
    decoder = decoder_of(model)
    assert decoder.depth == model.config.num_hidden_layers == depth
    assert_numbered(decoder)
    assert_tied(model)
    model.save_pretrained(folder)
    reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
    assert torch.equal(logits(model), logits(reloaded))
    assert reloaded.generation_config.max_new_tokens == 7
    assert_tied(reloaded)
    assert_numbered(decoder_of(reloaded))
    for name in decoder.family.per_layer:
        assert getattr(reloaded.config, name, None) == getattr(model.config, name, None)
    assert_cache_is_exact(model, reloaded)


def assert_numbered(decoder: Decoder) -> None:
    """Every module that knows its layer's index has the right one, and every list is as long as the stack."""
    for index, layer in enumerate(decoder.stack):
        held = [module.layer_idx for module in layer.modules() if getattr(module, "layer_idx", None) is not None]
        assert held == [index] * len(held)
        assert held or decoder.family.model_type in STANDINS
    lists = [getattr(decoder.config, name, None) for name in decoder.family.per_layer]
    assert [values for values in lists if values is not None and len(values) != decoder.depth] == []


def assert_tied(model: PreTrainedModel) -> None:
    """Head and embeddings are one tensor if and only if the config says so."""
    same = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert same == getattr(model.config, "tie_word_embeddings", False)


@torch.no_grad()
def assert_cache_is_exact(model: PreTrainedModel, reloaded: PreTrainedModel) -> None:
    """Logits token by token are those of the whole at once, and greedy generation is the same text."""
    whole = logits(model)
    cache = None
    for position in range(whole.shape[1]):
        step = model(input_ids=ids()[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        torch.testing.assert_close(step.logits[:, 0], whole[:, position], atol=1e-5, rtol=1e-5)
    texts = [reloaded.generate(ids(12), max_new_tokens=10, do_sample=False, use_cache=use) for use in (True, False)]
    assert torch.equal(*texts)


def train(model: nn.Module, steps: int = 2) -> list[float]:
    """Losses before, between and after `steps` optimizer steps on one batch."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids(), labels=ids(), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        losses.append(model(input_ids=ids(), labels=ids(), use_cache=False).loss.item())
    model.eval()
    return losses


def assert_trains(model: nn.Module) -> None:
    """Two steps lower the loss."""
    losses = train(model)
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]


def assert_takes_lora(model: PreTrainedModel) -> None:
    """Adapters in every layer train, and merging them changes nothing but rounding."""
    depth = decoder_of(model).depth
    before = logits(model)
    torch.manual_seed(4)
    adapted = attach_lora(model, LoraSettings(rank=2, alpha=4))
    adapters = [name for name, _ in adapted.named_parameters() if "lora_B" in name]
    path = decoder_of(model).family.stack
    assert all(any(f"{path}.{index}." in name for name in adapters) for index in range(depth))
    assert_trains(adapted)
    trained = logits(adapted)
    assert not torch.allclose(trained, before, atol=1e-3)
    torch.testing.assert_close(logits(adapted.merge_and_unload()), trained, atol=1e-5, rtol=1e-5)
