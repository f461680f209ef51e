"""Task files read without the harness."""

from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Leaves `!function module.name` as the string module.name."""


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def read_task_file(path: Path) -> dict[str, Any]:
    """The file, functions as their names."""
    values: dict[str, Any] = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    return values
