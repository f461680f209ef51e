"""The small suite, built once."""

from pathlib import Path

import pytest

from laco_train.evaluation.harness import TASK_FILES
from tests.evaluation.mini_suite import build_suite
from tests.evaluation.task_files import read_task_file


@pytest.fixture(scope="session")
def mini_suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a suite of invented questions for every task that runs offline."""
    subjects = [one["task"] for one in read_task_file(TASK_FILES / "mmlu.yaml")["task"]]
    return build_suite(tmp_path_factory.mktemp("suite"), subjects)
