"""What a model makes of the calibration text, and what is refused before a search is built on that."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from laco_train.collapse import make_plan
from laco_train.errors import InputError
from laco_train.settings import CollapseSettings
from tests.collapse.helpers import ALL_KEPT, TEXTS, scramble
from tests.collapse.tiny import tiny

Llama = Callable[..., LlamaForCausalLM]
STREAMED = [pytest.param("device", id="on the device"), pytest.param("stream", id="streamed")]
RESHAPING: dict[str, dict[str, Any]] = {
    "cpmant": {"dim_head": 8, "dim_ff": 64, "prompt_length": 4},  # a prompt of its own before each sample
    "deepseek_v4": {  # two streams of states between layers
        "hidden_size": 64,
        "head_dim": 32,
        "q_lora_rank": 16,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "o_groups": 2,
        "o_lora_rank": 8,
        "hc_mult": 2,
        "max_position_embeddings": 256,
        "layer_types": ["sliding_attention"] * 6,
        "mlp_layer_types": ["moe"] * 6,
    },
}


def with_pad(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy whose pad token comes after all that the models have embeddings for."""
    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"pad_token": "<pad>"})
    assert other.pad_token_id == len(tokenizer)
    return other


@pytest.mark.parametrize("placement", STREAMED)
def test_a_pad_token_without_an_embedding_changes_nothing(
    tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase, placement: Any
) -> None:
    settings = CollapseSettings(layers_per_merge=2, min_interval=1, placement=placement, calibration=TEXTS)
    model = scramble(tiny_llama(layers=6), seed=3)
    plans = [make_plan(model, each, settings) for each in (tiny_tokenizer, with_pad(tiny_tokenizer))]
    assert [c.similarity for c in plans[0].candidates] == [c.similarity for c in plans[1].candidates]
    assert plans[0].calibration == plans[1].calibration


@pytest.mark.parametrize("placement", STREAMED)
@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_a_sample_longer_than_learned_positions_is_refused(
    tiny_tokenizer: PreTrainedTokenizerBase, kind: str, placement: Any
) -> None:
    longest = max(len(tiny_tokenizer(text)["input_ids"]) for text in TEXTS)
    key = "n_positions" if kind == "gpt2" else "max_position_embeddings"
    wanted = CollapseSettings(layers_per_merge=2, placement=placement, calibration=TEXTS)
    assert make_plan(tiny(kind, **{key: longest}), tiny_tokenizer, wanted).calibration is not None
    with pytest.raises(InputError, match=rf"^collapse\.calibration: .*{longest} tokens.* {longest - 1} positions"):
        make_plan(tiny(kind, **{key: longest - 1}), tiny_tokenizer, wanted)


def test_rotary_positions_have_no_end(tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    model = scramble(tiny_llama(layers=9, max_position_embeddings=8), seed=3)
    assert make_plan(model, tiny_tokenizer, ALL_KEPT).depth == 3


@pytest.mark.parametrize("placement", STREAMED)
@pytest.mark.parametrize("kind", RESHAPING)
def test_states_that_are_not_one_a_token_are_refused(
    tiny_tokenizer: PreTrainedTokenizerBase, kind: str, placement: Any
) -> None:
    wanted = CollapseSettings(layers_per_merge=2, merge_rule="drop", placement=placement, calibration=TEXTS)
    with pytest.raises(InputError, match=rf"^model\.source: {kind} .*one state a token"):
        make_plan(tiny(kind, **RESHAPING[kind]), tiny_tokenizer, wanted)


@pytest.mark.parametrize("placement", STREAMED)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_states_that_are_not_finite_are_told(
    tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase, placement: Any, value: float
) -> None:
    model = scramble(tiny_llama(layers=6), seed=3)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = value
    wanted = CollapseSettings(layers_per_merge=2, placement=placement, calibration=TEXTS)
    with pytest.raises(InputError, match=r"not finite.*model\.dtype: float32.*damaged") as error:
        make_plan(model, tiny_tokenizer, wanted)
    assert error.value.key == "model.source"
