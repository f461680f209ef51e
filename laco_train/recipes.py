"""Finds what a recipe names: a path, a file under ./recipes or ./data, or one that the package ships."""

import os
from pathlib import Path

from laco_train.errors import InputError
from laco_train.files import home

_PACKAGE = Path(__file__).parent


def shipped(kind: str) -> Path:
    """Folder of shipped files: inside an installed wheel, or beside the package in a checkout.

    Args:
        kind: ``recipes`` or ``data``.
    """
    inside = _PACKAGE / "shipped" / kind
    return inside if inside.is_dir() else _PACKAGE.parent / kind


def find(kind: str, name: str) -> Path | None:
    """The file `name` as a path, under ./`kind`, or among the shipped files; None if there is none."""
    for candidate in (home(name), Path(kind) / name, shipped(kind) / name):
        if os.path.isfile(candidate):  # unlike Path.is_file, False for a name that is too long
            return candidate
    return None


def find_recipe(name: str) -> Path:
    """Path of recipe `name`; a missing one is an InputError that lists what the package ships."""
    for spelling in (name, f"{name}.yaml"):
        found = find("recipes", spelling)
        if found is not None:
            return found
    known = ", ".join(sorted(p.name for p in shipped("recipes").glob("*.yaml")))
    raise InputError("--recipe", f"no file {name!r}, neither here, nor under ./recipes, nor shipped ({known})")
