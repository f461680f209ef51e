"""Tables, JSON, Markdown and events of an evaluation whose numbers are made up."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from laco_train.evaluation.perplexity import Perplexity, Protocol
from laco_train.evaluation.report import markdown, notes, rich_table, tables, to_json, write_evaluation
from laco_train.evaluation.result import Evaluation, ModelResult
from laco_train.evaluation.scores import TaskScore

RIGHT = {
    "original": {"hellaswag": 60, "piqa": 80, "boolq": 70, "lambada_openai": 0},
    "collapsed": {"hellaswag": 59, "piqa": 40, "boolq": 62, "lambada_openai": 0},
}
CHANCE = {"hellaswag": 0.25, "piqa": 0.5, "boolq": 0.5, "lambada_openai": None}


def model(name: str, tokens: str = "same", loss: float = 2.0) -> ModelResult:
    scores = tuple(
        TaskScore(
            task=task,
            metric="acc",
            values=(1.0,) * right + (0.0,) * (100 - right),
            questions=task,
            chance=CHANCE[task],
            same_answer=0.62 if task == "boolq" else None,
            data="the hub, split validation",
        )
        for task, right in RIGHT[name].items()
    )
    protocol = Protocol(8, 4, "T, 320 entries", "none", "f" * 64, tokens)
    perplexity = Perplexity(loss, 1.5, 99, 300, protocol)
    return ModelResult(name, f"./{name}", 6, 1000, "float32", scores, perplexity, (f"{name} | wrote",))


@pytest.fixture
def evaluation() -> Evaluation:
    versions = {"torch": "2", "lm-eval": "0.4.13"}
    return Evaluation((model("original"), model("collapsed")), True, ("Say",), "CPU", None, versions)


def test_table_of_tasks_by_group(evaluation: Evaluation) -> None:
    found = tables(evaluation)[0]
    assert found.header == ("task", "metric", "questions", "chance", "original", "collapsed", "kept")
    rows = {row[0]: row for row in found.rows}
    assert list(rows) == [
        "reasoning, mean of 2",
        "hellaswag",
        "piqa",
        "knowledge, mean of 1",
        "boolq",
        "understanding, mean of 1",
        "lambada_openai*",
        "all, mean of 4",
    ]
    # one question apart of a hundred: noise; 40 of 80: not, and no better than guessing
    assert rows["hellaswag"] == ("hellaswag", "acc", "100", "0.250", "0.600 ± 0.049", "0.590 ± 0.049", "98% ≈")
    assert rows["piqa"][4:] == ("0.800 ± 0.040", "0.400 ± 0.049°", "50%")
    assert rows["reasoning, mean of 2"][4:] == ("0.700 ± 0.032", "0.495 ± 0.035", "71%")
    assert rows["lambada_openai*"][3:] == ("-", "0.000 ± 0.010", "0.000 ± 0.010", "- ≈")
    assert [found.rows[index][0].partition(",")[0] for index in found.best] == [
        "reasoning",
        "knowledge",
        "understanding",
        "all",
    ]
    assert "1.96 standard errors" in found.about and "paired" in found.about


def test_without_a_baseline_nothing_is_compared(evaluation: Evaluation) -> None:
    alone = Evaluation(evaluation.models, False, ("Say",), "CPU", 100, {})
    found = tables(alone)[0]
    assert "kept" not in found.header and "≈" not in str(found.rows)
    assert "At most 100 questions" in found.about and "Kept" not in found.about
    assert "kept" not in to_json(alone)["models"][1]["tasks"]["piqa"]


def test_json_holds_every_number(evaluation: Evaluation) -> None:
    values = json.loads(json.dumps(to_json(evaluation), allow_nan=False))
    piqa = values["models"][1]["tasks"]["piqa"]
    assert (piqa["group"], piqa["accuracy"], piqa["kept"], piqa["chance"]) == ("reasoning", 0.4, 0.5, 0.5)
    assert (piqa["difference"], piqa["paired"], piqa["within_noise"]) == (pytest.approx(-0.4), True, False)
    assert piqa["no_better_than_chance"] and piqa["questions"] == 100
    assert values["models"][1]["groups"]["reasoning"]["kept"] == pytest.approx(0.99 / 1.4)
    assert values["models"][1]["perplexity"]["protocol"]["stride"] == 4
    assert (values["baseline"], values["versions"]["lm-eval"]) == ("original", "0.4.13")
    assert "1.96" in values["test"]


def test_an_infinite_perplexity_is_no_number(evaluation: Evaluation) -> None:
    lost = Evaluation((model("original", loss=1000.0),), False, (), "CPU", None, {})
    found = to_json(lost)["models"][0]["perplexity"]
    assert (found["perplexity"], found["loss"]) == (None, 1000.0)
    assert any("inf" in cell for cell in tables(lost)[1].rows[0])


def test_notes_warn_of_one_answer_and_of_unlike_tokens(evaluation: Evaluation) -> None:
    assert notes(evaluation) == ["boolq: always giving the most frequent answer would reach 0.620."]
    unlike = Evaluation((model("original"), model("collapsed", "other")), True, ("Say",), "CPU", None, {})
    assert "compare bits per byte" in notes(unlike)[-1]


def test_page_shows_samples_side_by_side(evaluation: Evaluation) -> None:
    page = markdown(evaluation)
    assert "### Say\n\n- **original**: original | wrote\n- **collapsed**: collapsed | wrote\n" in page
    assert "stride 4" in page and "| **reasoning, mean of 2** |" in page


def test_terminal_shows_the_same_cells(evaluation: Evaluation) -> None:
    console = Console(file=io.StringIO(), width=160)
    console.print(rich_table(tables(evaluation)[0]))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "0.400 ± 0.049°" in text and "98% ≈" in text


def test_written_folder(evaluation: Evaluation, tmp_path: Path) -> None:
    page = write_evaluation(evaluation, tmp_path / "out")
    assert page.read_text(encoding="utf-8") == markdown(evaluation)
    assert json.loads((tmp_path / "out/evaluation.json").read_text())["models"][0]["name"] == "original"
    events = EventAccumulator(str(tmp_path / "out/tensorboard/collapsed"))
    events.Reload()
    shown = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}
    assert shown["accuracy/piqa"] == pytest.approx(0.4)
    assert shown["kept/piqa"] == pytest.approx(0.5)
    assert shown["accuracy/mean_reasoning"] == pytest.approx(0.495)
    assert shown["text/bits_per_byte"] == pytest.approx(1.5)
