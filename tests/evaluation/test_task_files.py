"""Task files, groups and the reading of the suite; none of it needs the harness."""

import importlib
from pathlib import Path
from typing import Any

import pytest

from laco_train.errors import InputError
from laco_train.evaluation import wording
from laco_train.evaluation.groups import GROUPS, OF_THE_PAPER, PLACED_HERE, SUITE, group_of
from laco_train.evaluation.harness import TASK_FILES
from laco_train.evaluation.suite import checked_suite, installed_suite, rows
from tests.evaluation import mini_suite as made
from tests.evaluation.task_files import read_task_file

FILES = {path.stem: read_task_file(path) for path in TASK_FILES.glob("*.yaml")}


def leaves(name: str) -> list[dict[str, Any]]:
    """Configurations of the tasks in one file: one, or MMLU's subjects."""
    values = FILES[name]
    return [{**values, **one} for one in values["task"]] if name == "mmlu" else [values]


def test_every_task_of_the_suite_has_a_file_and_a_group() -> None:
    assert set(FILES) == set(SUITE)
    assert all(group_of(task) != "other" for task in SUITE)
    assert not set(OF_THE_PAPER) & set(PLACED_HERE)
    order = [GROUPS.index(group_of(task)) for task in SUITE]
    assert order == sorted(order)
    assert group_of("gsm8k") == "other"


@pytest.mark.parametrize("name", SUITE)
def test_task_file_names_its_rows_and_functions(name: str) -> None:
    values = FILES[name]
    assert values["group" if name == "mmlu" else "task"] == name
    assert values["custom_dataset"] == "laco_train.evaluation.suite.rows"
    assert "acc" in [metric["metric"] for metric in values["metric_list"]]
    functions = [v for v in values.values() if isinstance(v, str) and v.startswith("laco_train.")]
    for function in functions:
        module, _, attribute = function.rpartition(".")
        assert callable(getattr(importlib.import_module(module), attribute))
    for leaf in leaves(name):
        assert leaf["dataset_kwargs"]["split"] == leaf["test_split"]


def test_mmlu_has_all_subjects() -> None:
    subjects = [one["task"] for one in FILES["mmlu"]["task"]]
    assert len(set(subjects)) == made.SUBJECTS
    assert all(
        f"/{subject}/" in one["dataset_kwargs"]["folder"] for subject, one in zip(subjects, leaves("mmlu"), strict=True)
    )


@pytest.mark.parametrize("name", SUITE)
def test_rows_are_found_and_nothing_is_written_beside_them(name: str, mini_suite: Path) -> None:
    before = sorted(mini_suite.rglob("*"))
    for leaf in leaves(name)[:2]:
        found = rows(suite=str(mini_suite), version=1.0, **leaf["dataset_kwargs"])
        (questions,) = found.values()
        assert len(questions) > 0
        if name == "hellaswag":
            wording.hellaswag(questions)
    assert sorted(mini_suite.rglob("*")) == before


def test_rows_have_the_hubs_columns(mini_suite: Path) -> None:
    def read(name: str) -> list[dict[str, Any]]:
        (found,) = rows(suite=str(mini_suite), **FILES[name]["dataset_kwargs"]).values()
        return found.to_list()

    assert [row["label"] for row in read("boolq")] == [1, 0, 1]
    assert [row["text"] for row in read("lambada_openai")] == ["".join(parts) for parts in made.LAMBADA]
    hot, flies = read("arc_easy")  # each once, though the file has it once a choice, and that twice
    assert (hot["question"], hot["answerKey"]) == ("What is hot?", "B")
    assert flies["choices"] == {"label": ["A", "B", "C"], "text": ["stone", "bird", "fish"]}
    assert read("openbookqa")[0]["question_stem"] == "The sun is"


def test_hellaswag_loses_its_brackets(mini_suite: Path) -> None:
    (found,) = rows(suite=str(mini_suite), **FILES["hellaswag"]["dataset_kwargs"]).values()
    first, second = wording.hellaswag(found)
    assert first["query"] == "Roof repair: A man is sitting on a roof. He"
    assert first["choices"][:2] == ["starts to pull up tiles.", "sings a song."]
    assert second["query"] == "Education and Communications: How to read. Choose a book. Sit down."
    assert second["choices"][1] == " Then sleep.. Wake up."


def test_suite_by_folder(mini_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checked_suite(mini_suite) == checked_suite(mini_suite.parent) == mini_suite
    with pytest.raises(InputError, match=r"^--suite: .* has no folder hf_datasets"):
        checked_suite(tmp_path)
    (mini_suite / "__init__.py").write_text("raise AssertionError('the package is not to be imported')")
    monkeypatch.syspath_prepend(mini_suite.parent)
    assert installed_suite() == mini_suite
    (mini_suite / "__init__.py").unlink()


def test_broken_suite_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^--suite: .*piqa can't be read"):
        rows(suite=str(tmp_path), folder="piqa", split="validation")
    (tmp_path / "arc").mkdir()
    (tmp_path / "arc/requests.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(InputError, match=r"^--suite: .*arc can't be read"):
        rows(suite=str(tmp_path), folder="arc", split="test", columns="arc")
