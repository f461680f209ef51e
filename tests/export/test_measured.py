"""Evaluations in the model card, read back as the Hub reads them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from laco_train.errors import InputError
from laco_train.evaluation.record import Accuracy
from laco_train.export import CardFacts, model_card
from laco_train.export.measured import merged, of_run, read_evaluations


def accuracy(step: int, task: str, value: float) -> Accuracy:
    return Accuracy(step, 64 * step, task, "acc", value, 0.0123, 1838, "sha", 0.5, "a suite, split test")


RECORD = [accuracy(step, task, 0.5 + step / 50) for step in (0, 3, 6) for task in ("piqa", "boolq")]


def model(name: str, piqa: float) -> dict[str, Any]:
    """A model as evaluate writes it, as far as it is read."""
    score = {"metric": "acc", "accuracy": piqa, "error": 0.011, "questions": 1838, "data": "a suite, split test"}
    protocol = {"text": "a" * 64, "block_length": 1024, "stride": 512}
    text = {"perplexity": 12.345, "bits_per_byte": 0.98765, "bytes": 5000, "protocol": protocol}
    return {"name": name, "layers": 4, "parameters": 100, "tasks": {"piqa": score}, "perplexity": text}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """An evaluation of a baseline of six layers and a collapsed model."""
    path = tmp_path / "evaluation.json"
    models = [{**model("original", 0.7), "layers": 6, "parameters": 150}, model("laco", 0.65)]
    path.write_text(json.dumps({"baseline": "original", "limit": None, "models": models}))
    return path


def results(facts: CardFacts) -> list[Any]:
    """What the Hub takes from the card of `facts`."""
    found: Any = ModelCard(model_card(facts, None)).data.eval_results
    return list(found or [])


def test_a_run_tells_its_start_and_its_end(facts: CardFacts) -> None:
    facts = dataclasses.replace(facts, evaluations=of_run(RECORD, steps=6))
    card = model_card(facts, None)
    about = "1,838 questions of a suite, split test"
    assert "| task | measure | collapsed | trained | measured on |" in card
    assert f"| piqa | acc | 0.500 ± 0.012 | 0.620 ± 0.012 | {about} |" in card
    found = results(facts)
    assert [(one.dataset_type, one.metric_type, one.metric_value) for one in found] == [
        ("piqa", "acc", 0.62), ("boolq", "acc", 0.62)
    ]  # fmt: skip
    assert found[0].task_type == "text-generation" and found[0].metric_name == "acc, standard error 0.0123"
    assert CardFacts.from_dict(json.loads(json.dumps(facts.to_dict()))) == facts


def test_a_run_that_stopped_early_tells_no_end() -> None:
    assert [one.is_exported for one in of_run(RECORD, steps=5)] == [False, False]
    assert [one.is_exported for one in of_run(RECORD[:2], steps=0)] == [True, True]


def test_without_evaluations_there_is_no_section(facts: CardFacts) -> None:
    card = model_card(facts, None)
    assert "## Evaluation" not in card and "model-index" not in card


def test_a_file_tells_the_model_and_its_baseline(facts: CardFacts, file: Path) -> None:
    found = read_evaluations([str(file)], layers=4, parameters=100)
    facts = dataclasses.replace(facts, evaluations=merged(of_run(RECORD, steps=6), found))
    card = model_card(facts, None)
    assert "| task | measure | collapsed | trained | original | laco | measured on |" in card
    # at the end of the run the same questions were asked, so the later measure stands alone
    assert "| piqa | acc | 0.500 ± 0.012 | - | 0.700 ± 0.011 | 0.650 ± 0.011 | 1,838 questions" in card
    assert "| text aaaaaaaaaaaaaaaa | perplexity | - | - | 12.35 | 12.35 | 5,000 bytes" in card
    named = {(one.dataset_type, one.metric_type): one.metric_value for one in results(facts)}
    assert named == {
        ("boolq", "acc"): 0.62,
        ("piqa", "acc"): 0.65,
        ("text aaaaaaaaaaaaaaaa", "perplexity"): 12.345,
        ("text aaaaaaaaaaaaaaaa", "bits_per_byte"): 0.98765,
    }


def test_the_model_in_a_file_can_be_named(file: Path) -> None:
    found = read_evaluations([f"original={file}"], layers=6, parameters=150)
    assert {(one.model, one.is_exported) for one in found} == {("original", True)}
    assert read_evaluations([str(file.parent)], 4, 100) == read_evaluations([f"laco={file}"], 4, 100)


def test_what_is_refused(file: Path, tmp_path: Path) -> None:
    values = json.loads(file.read_text())
    several, odd = tmp_path / "several.json", tmp_path / "odd.json"
    several.write_text(json.dumps({**values, "models": [*values["models"], model("sleb", 0.6)]}))
    odd.write_text("{}")
    for named, layers, problem in (
        (str(tmp_path / "none.json"), 4, "none.json can't be read"),
        (str(odd), 4, "is not what evaluate writes (KeyError: 'baseline')"),
        (str(several), 4, "holds several; say which one it is, as NAME=FILE: original, laco, sleb"),
        (f"tail={file}", 4, "has no model 'tail'; say which one"),
        (str(file), 5, "laco in .* has 4 layers and 100 parameters, the exported model 5 and 100"),
    ):
        with pytest.raises(InputError, match=f"^--evaluation: .*{problem}".replace("(", r"\(").replace(")", r"\)")):
            read_evaluations([named], layers, 100)


def test_an_infinite_perplexity_is_left_out(file: Path) -> None:
    values = json.loads(file.read_text())
    values["models"][1]["perplexity"]["perplexity"] = None
    file.write_text(json.dumps(values))
    found = read_evaluations([str(file)], 4, 100)
    assert [one.metric for one in found if one.is_exported] == ["acc", "bits_per_byte"]
