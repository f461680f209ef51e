"""Fixtures of the export's tests: tiny Llamas collapsed from six layers to four."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from laco_train.collapse import CollapsePlan, collapse_model
from laco_train.export import CardFacts
from laco_train.export.licence import Licence
from laco_train.settings import CollapseSettings

Collapsed = tuple[LlamaForCausalLM, CollapsePlan]


@pytest.fixture
def collapsed(
    tiny_llama: Callable[..., LlamaForCausalLM], tiny_tokenizer: PreTrainedTokenizerFast
) -> Callable[..., Collapsed]:
    """Factory of (model of four layers, its plan): ``collapsed(dtype=torch.float32, **tiny_llama arguments)``."""

    def build(dtype: torch.dtype = torch.float32, **arguments: Any) -> Collapsed:
        settings = CollapseSettings(remove=[2, 3])
        return collapse_model(tiny_llama(**arguments).to(dtype), tiny_tokenizer, settings, source="org/tiny")

    return build


@pytest.fixture
def adapted(collapsed: Callable[..., Collapsed]) -> Callable[..., tuple[PeftModel, CollapsePlan]]:
    """Factory of collapsed models with LoRA on every linear layer, its matrices random so that they matter."""

    def build(**arguments: Any) -> tuple[PeftModel, CollapsePlan]:
        model, plan = collapsed(**arguments)
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        peft_model = get_peft_model(model, config)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        return peft_model, plan

    return build


@pytest.fixture
def facts() -> CardFacts:
    """What a run would tell the model card."""
    return CardFacts(
        base_model="org/tiny",
        recipe="tiny.yaml",
        method="full",
        data={"train": "austen.jsonl.gz", "block size": 64},
        losses={"original": 2.0, "collapsed": 5.0, "trained": 2.5},
        tokens=12_345,
        steps=20,
        licence=Licence("apache-2.0"),
    )
