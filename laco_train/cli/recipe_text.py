"""What is refused of a recipe's text before its keys are read: YAML that is broken, ambiguous, or made to exhaust."""

import math
from pathlib import Path
from typing import Any

import yaml

from laco_train.errors import InputError
from laco_train.settings import SECTIONS

MOST_VALUES = 100_000
"""Values that a recipe may stand for, once each alias is written out."""
_SECTIONS = (*SECTIONS, "trainer", "study", "sweep")
_KEY = "--recipe"


def check_recipe(path: Path) -> None:
    """Refuse a recipe that no parser of sections and keys should see.

    Raises:
        InputError: in one line that names the file, and the section where there is one.
    """
    try:
        root: Any = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        if not isinstance(root, yaml.MappingNode):
            raise InputError(_KEY, f"{path} is {'no YAML of sections and keys' if root else 'empty'}; name a recipe")
        if _values(root, {}) > MOST_VALUES:
            raise InputError(_KEY, f"{path} stands for more than {MOST_VALUES:,} values; write them without aliases")
    except UnicodeDecodeError:
        raise InputError(_KEY, f"{path} is not text; name a recipe in YAML") from None
    except OSError as error:
        raise InputError(_KEY, f"{path} can't be read ({error.strerror})") from None
    except yaml.YAMLError as error:
        raise InputError(_KEY, f"{path} is no YAML of sections and keys ({error})") from None
    except RecursionError:
        raise InputError(_KEY, f"{path} is nested too deeply to be a recipe") from None
    for key, value in root.value:
        if key.value in _SECTIONS and not isinstance(value, yaml.MappingNode):
            raise InputError(key.value, f"is a section, but {path} has no keys in it; write some, or leave it out")


def sections(path: Path) -> set[str]:
    """Keys at the top of a recipe that `check_recipe` let through."""
    root: Any = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    return {key.value for key, _ in root.value}


def _values(node: Any, counted: dict[int, float]) -> float:
    """How many values `node` stands for, aliases written out; infinity if it holds itself."""
    if id(node) in counted:
        return counted[id(node)]
    counted[id(node)] = math.inf
    total = 1.0
    if isinstance(node, yaml.SequenceNode):
        total += sum(_values(item, counted) for item in node.value)
    elif isinstance(node, yaml.MappingNode):
        _refuse_twins(node)
        total += sum(_values(key, counted) + _values(value, counted) for key, value in node.value)
    counted[id(node)] = total
    return total


def _refuse_twins(node: yaml.MappingNode) -> None:
    """YAML's loader would let the last one win, without a word."""
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise InputError(_KEY, f"has a key that is no word in line {_line(key)}")
        if key.value in seen:
            raise InputError(_KEY, f"has the key {key.value} a second time in line {_line(key)}; leave one")
        seen.add(key.value)


def _line(node: Any) -> int:
    return int(node.start_mark.line) + 1
