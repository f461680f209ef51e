"""Our task files ask what the harness's own ask: same rows in, same prompts, choices, answers and measures out."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="the extra evaluation")

from lm_eval import tasks as harness_tasks
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

from laco_train.evaluation.groups import SUITE
from laco_train.evaluation.harness import load_tasks

OWN = Path(harness_tasks.__file__).parent
FILES = {
    "hellaswag": "hellaswag/hellaswag.yaml",
    "piqa": "piqa/piqa.yaml",
    "social_iqa": "siqa/siqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "commonsense_qa": "commonsense_qa/default.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "sciq": "sciq/sciq.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
}


def harness_own(file: Path, rows: Any) -> ConfigurableTask:
    """The harness's own task with `rows` in place of every split of its data."""
    config = load_yaml(file)
    config.pop("tag", None)
    splits = ("train", "validation", "test", "dev")
    config["custom_dataset"] = lambda **_: dict.fromkeys(splits, rows)
    return ConfigurableTask(config=config)


def asked(task: ConfigurableTask) -> list[Any]:
    """Everything that reaches the model, and the answer, of every question."""
    found = []
    for doc in task.eval_docs:
        context = task.fewshot_context(doc, 0)
        requests = task.construct_requests(doc, context, metadata=(task.config.task, 0, 1))
        several = requests if isinstance(requests, list) else [requests]
        answer = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        choices = task.doc_to_choice(doc) if task.config.doc_to_choice is not None else None
        found.append(([request.args for request in several], choices, answer))
    return found


def compare(ours: ConfigurableTask, file: Path) -> None:
    """Ours and the harness's own in `file`, on the same rows."""
    (rows,) = ours.dataset.values()
    theirs = harness_own(file, rows)
    assert len(asked(ours)) > 0
    assert asked(ours) == asked(theirs)
    assert ours.OUTPUT_TYPE == theirs.OUTPUT_TYPE
    assert set(ours.aggregation()) == set(theirs.aggregation())


@pytest.mark.parametrize("name", FILES)
def test_prompts_are_the_harness_own(name: str, mini_suite: Path) -> None:
    (row,) = load_tasks([name], mini_suite)
    compare(row.leaves[name], OWN / FILES[name])


def test_mmlu_prompts_are_the_harness_own(mini_suite: Path) -> None:
    (row,) = load_tasks(["mmlu"], mini_suite)
    assert len(row.leaves) == 57
    for name, ours in row.leaves.items():
        compare(ours, OWN / f"mmlu/default/mmlu_{name.removeprefix('mmlu::')}.yaml")


def test_all_of_the_suite_is_compared() -> None:
    assert {*FILES, "mmlu"} == set(SUITE)
