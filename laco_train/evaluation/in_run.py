"""What a recipe's section `evaluation` asks for, read and checked before a run begins."""

from collections.abc import Iterator
from contextlib import contextmanager

from laco_train.errors import InputError
from laco_train.evaluation.groups import named_tasks
from laco_train.evaluation.harness import TaskRow, load_tasks
from laco_train.evaluation.samples import PROMPTS, read_prompts
from laco_train.evaluation.suite import chosen_suite
from laco_train.files import home
from laco_train.settings import EvaluationSettings


def questions_of(s: EvaluationSettings) -> list[TaskRow]:
    """Questions of the recipe's tasks; none where it names no task, which needs no harness.

    Raises:
        InputError: as `load_tasks`, by the recipe's keys.
    """
    if not s.tasks:
        return []
    with _keys_of_a_recipe():
        return load_tasks(named_tasks(s.tasks), chosen_suite(s.suite))


def prompts_of(s: EvaluationSettings) -> tuple[str, ...]:
    """Prompts of the recipe's samples; none where it asks for no samples.

    Raises:
        InputError: as `read_prompts`, by the recipe's keys.
    """
    if not s.samples:
        return ()
    with _keys_of_a_recipe():
        return PROMPTS if s.prompts is None else read_prompts(home(s.prompts))


@contextmanager
def _keys_of_a_recipe() -> Iterator[None]:
    """The verb's options, such as --tasks, are keys of the section here."""
    try:
        yield
    except InputError as error:
        name = error.key.removeprefix("--")
        raise InputError(f"evaluation.{name}", str(error).removeprefix(f"{error.key}: ")) from error
