"""Stand-ins for two families whose code comes with their weights, saved and loaded as remote code.

Module names, parameter names and layouts are those of Baichuan2-7B and InternLM2; the arithmetic is a Llama's. They
show that a row of the table finds its way through such names, not that the published code runs on this Transformers.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb


# Each config has its own __init__, as Transformers writes one for a subclass that lacks it.
class StandInConfig(PretrainedConfig):
    def __init__(self, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4, **kwargs):
        self.vocab_size = kwargs.pop("vocab_size", 320)
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = kwargs.pop("num_key_value_heads", num_attention_heads)
        self.max_position_embeddings = kwargs.pop("max_position_embeddings", 256)
        self.rms_norm_eps = 1e-6
        super().__init__(**kwargs)
        self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}


class BaichuanConfig(StandInConfig):
    model_type = "baichuan"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)


class InternLM2Config(StandInConfig):
    model_type = "internlm2"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)


def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, rotary: Any, cache: Any) -> Tensor:
    """(S, heads, T, head size) queries, keys and values to (S, T, hidden size)."""
    q, k = apply_rotary_pos_emb(q, k, *rotary)
    if cache is not None:
        k, v = cache.update(k, v, module.layer_idx)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    causal = mask is None and q.shape[2] > 1
    return nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal).transpose(1, 2).flatten(2)


class BaichuanAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx, self.heads = layer_idx, config.num_attention_heads
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x, mask, rotary, cache):
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.W_pack(x).chunk(3, -1))
        return self.o_proj(attend(self, q, k, v, mask, rotary, cache))


class InternLM2Attention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx, self.kv_heads = layer_idx, config.num_key_value_heads
        self.groups = config.num_attention_heads // config.num_key_value_heads
        size = config.hidden_size // config.num_attention_heads
        self.wqkv = nn.Linear(config.hidden_size, (self.groups + 2) * self.kv_heads * size, bias=False)
        self.wo = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x, mask, rotary, cache):
        packed = self.wqkv(x).unflatten(-1, (self.kv_heads, self.groups + 2, -1))
        q, k, v = packed[..., :-2, :].flatten(2, 3), packed[..., -2, :], packed[..., -1, :]
        return self.wo(attend(self, *(part.transpose(1, 2) for part in (q, k, v)), mask, rotary, cache))


class BaichuanMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class InternLM2MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class BaichuanLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.self_attn = BaichuanAttention(config, layer_idx)
        self.mlp = BaichuanMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size)

    def forward(self, hidden_states, mask=None, rotary=None, cache=None):
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), mask, rotary, cache)
        return (hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)),)


class InternLM2DecoderLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.attention = InternLM2Attention(config, layer_idx)
        self.feed_forward = InternLM2MLP(config)
        self.attention_norm = LlamaRMSNorm(config.hidden_size)
        self.ffn_norm = LlamaRMSNorm(config.hidden_size)

    def forward(self, hidden_states, mask=None, rotary=None, cache=None):
        hidden_states = hidden_states + self.attention(self.attention_norm(hidden_states), mask, rotary, cache)
        return (hidden_states + self.feed_forward(self.ffn_norm(hidden_states)),)


class StandInModel(PreTrainedModel):
    _supports_sdpa = True
    embeddings: str
    layer: type[nn.Module]

    def __init__(self, config):
        super().__init__(config)
        setattr(self, self.embeddings, nn.Embedding(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList([self.layer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.post_init()

    def get_input_embeddings(self):
        return getattr(self, self.embeddings)

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=True):
        x = self.get_input_embeddings()(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        positions = torch.arange(seen, seen + x.shape[1], device=x.device)[None]
        mask = create_causal_mask(
            config=self.config, inputs_embeds=x, attention_mask=attention_mask, past_key_values=past_key_values
        )
        rotary = self.rotary_emb(x, positions)
        for layer in self.layers:
            x = layer(x, mask, rotary, past_key_values)[0]
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=past_key_values)


class BaichuanModel(StandInModel):
    config_class = BaichuanConfig
    embeddings, layer = "embed_tokens", BaichuanLayer


class InternLM2Model(StandInModel):
    config_class = InternLM2Config
    embeddings, layer = "tok_embeddings", InternLM2DecoderLayer


class StandInForCausalLM(PreTrainedModel, GenerationMixin):
    base_model_prefix = "model"
    _supports_sdpa = True
    inner: type[StandInModel]
    head: str

    def __init__(self, config):
        super().__init__(config)
        self.model = self.inner(config)
        setattr(self, self.head, nn.Linear(config.hidden_size, config.vocab_size, bias=False))
        self.post_init()

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def get_output_embeddings(self):
        return getattr(self, self.head)

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=True, labels=None, **kwargs):
        out = self.model(input_ids, attention_mask, past_key_values, use_cache)
        logits = self.get_output_embeddings()(out.last_hidden_state)
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=out.past_key_values)


class BaichuanForCausalLM(StandInForCausalLM):
    config_class = BaichuanConfig
    inner, head = BaichuanModel, "lm_head"


class InternLM2ForCausalLM(StandInForCausalLM):
    config_class = InternLM2Config
    inner, head = InternLM2Model, "output"


for config_class, model_class in ((BaichuanConfig, BaichuanForCausalLM), (InternLM2Config, InternLM2ForCausalLM)):
    config_class.register_for_auto_class()
    model_class.register_for_auto_class("AutoModelForCausalLM")
