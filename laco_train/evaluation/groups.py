"""Tasks by the ability they test, as the paper (arXiv 2402.11187, table 1) groups its own."""

from collections.abc import Sequence
from typing import Literal, get_args

from laco_train.errors import InputError

Group = Literal["reasoning", "language", "knowledge", "examination", "understanding", "other"]
GROUPS: tuple[Group, ...] = get_args(Group)

OF_THE_PAPER: dict[str, Group] = {
    "hellaswag": "reasoning",
    "piqa": "reasoning",
    "wsc": "language",
    "commonsense_qa": "knowledge",
    "boolq": "knowledge",
    "mmlu": "examination",
    "cmmlu": "examination",
    "race": "understanding",
}
"""Tasks that the paper names, under the harness's names."""

PLACED_HERE: dict[str, Group] = {
    "social_iqa": "reasoning",
    "winogrande": "language",
    "arc_easy": "examination",
    "arc_challenge": "examination",
    "sciq": "examination",
    "openbookqa": "understanding",
    "lambada_openai": "understanding",
}
"""Tasks that the paper does not name, where OpenCompass, which the paper measured with, has its like."""

SUITE = (
    "hellaswag",
    "piqa",
    "social_iqa",
    "winogrande",
    "commonsense_qa",
    "boolq",
    "mmlu",
    "arc_easy",
    "arc_challenge",
    "sciq",
    "openbookqa",
    "lambada_openai",
)
"""Tasks that run without the hub, in the order of the groups."""


def group_of(task: str) -> Group:
    """The group of a task of the harness; ``other`` where neither the paper nor this module has placed it."""
    return OF_THE_PAPER.get(task) or PLACED_HERE.get(task) or "other"


def named_tasks(names: Sequence[str]) -> list[str]:
    """`names`, with all of `SUITE` in place of ``all`` alone.

    Raises:
        InputError: one is named twice.
    """
    found = list(SUITE) if list(names) == ["all"] else list(names)
    if twice := [name for name in found if found.count(name) > 1]:
        raise InputError("--tasks", f"names {twice[0]} twice; drop one")
    return found
