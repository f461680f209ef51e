"""Where the runs of a study are, and what they left there."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from laco_train.errors import InputError
from laco_train.files import write_whole
from laco_train.study.arms import Recipe, leaves

RECIPE_FILE = "recipe.yaml"
"""In a run's place: the recipe of fit that it is."""
CONFIG_FILE, SUMMARY_FILE, LOG_FILE = "config.yaml", "summary.json", "fit.log"


@dataclass(frozen=True)
class Place:
    """A folder that holds the recipe and the output of one fit, and the run's own folder.

    Attributes:
        logs: Lightning's folder, lightning_logs.
        name: path of this one below it, which fit takes as the name of the run.
    """

    logs: Path
    name: str

    @property
    def folder(self) -> Path:
        """It."""
        return self.logs / self.name

    @property
    def run(self) -> Path:
        """What fit leaves."""
        return self.folder / "version_0"

    @property
    def recipe(self) -> Recipe | None:
        """The recipe that was written here; None: none was."""
        path = self.folder / RECIPE_FILE
        if not path.is_file():
            return None
        values: Recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        return values

    @property
    def summary(self) -> dict[str, Any]:
        """The outcome of a finished run."""
        values: dict[str, Any] = json.loads((self.run / SUMMARY_FILE).read_text(encoding="utf-8"))
        return values

    @property
    def begun(self) -> bool:
        """Whether there is something to go on with."""
        return (self.run / CONFIG_FILE).is_file()

    def finished(self, recipe: Recipe) -> bool:
        """Whether nothing is left to do for `recipe`."""
        exported = not recipe["export"]["enabled"] or (self.run / "export").is_dir()
        return (self.run / SUMMARY_FILE).is_file() and exported

    def write(self, recipe: Recipe) -> Path:
        """Put `recipe` here; returns its file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / RECIPE_FILE
        write_whole(path, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
        return path

    def refuse_other(self, recipe: Recipe) -> None:
        """InputError if a run has begun here that is not that of `recipe`, the keys aside that are harmless to it."""
        from laco_train.cli.resume import is_harmless  # imports torch

        if not self.begun or self.recipe is None:
            return
        then, now = leaves(self.recipe), leaves(recipe)
        for key in sorted(then.keys() | now.keys()):
            if then.get(key) != now.get(key) and not is_harmless(key):
                raise InputError(
                    key,
                    f"was {then.get(key)} when {self.folder} began and is {now.get(key)} now; undo this, "
                    "rename the recipe, or delete that folder",
                )
