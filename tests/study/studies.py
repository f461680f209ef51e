"""Whole studies on a tiny model: fits run in this process, where a test can stop them."""

import contextlib
import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from laco_train.cli import main
from laco_train.cli.study import checked, parser, with_arms
from laco_train.study.arms import merged
from laco_train.study.process import Fit
from laco_train.study.run import Study, run_study
from tests.cli.runs import CALIBRATION, RECIPE, Project

SHARED: dict[str, Any] = {
    **{key: value for key, value in RECIPE.items() if key != "seed_everything"},
    "collapse": {"layers_per_merge": 2, "target_depth": 4, "calibration": CALIBRATION},
    "budget": {"max_tokens": 384, "evaluate_at": [0.5, 1.0]},  # six steps
    "trainer": {key: value for key, value in RECIPE["trainer"].items() if key != "max_steps"},
    "study": {"arms": {"original": {}, "laco": {}, "scratch": {}}, "seeds": [0, 1]},
}


def fit_here(arguments: list[str], log: Path) -> int:
    """Run fit in this process."""
    with log.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        return main(["fit", *arguments])


def forget_stop(run: Path) -> None:
    """The run's recipe without the callback that ended it, which would be refused as a change."""
    path = run / "config.yaml"
    values = yaml.safe_load(path.read_text())
    callbacks = values["trainer"]["callbacks"]
    values["trainer"]["callbacks"] = [one for one in callbacks if not one["class_path"].endswith(".At")]
    path.write_text(yaml.safe_dump(values))


@dataclasses.dataclass
class Outcome:
    """A study that was run, and what it said."""

    study: Study
    lines: list[str]

    def run(self, name: str) -> Path:
        """Folder of a run, such as laco-seed0."""
        return self.study.folder / name / "version_0"


def write_recipe(project: Project, changes: dict[str, Any] | None = None, *, below: dict[str, Any] = SHARED) -> None:
    """Put s.yaml into the project: `changes` over `below`."""
    text = yaml.safe_dump(merged(below, changes or {}), sort_keys=False)
    (project.root / "s.yaml").write_text(text, encoding="utf-8")


def ready(project: Project, *arguments: str, fit: Fit = fit_here) -> tuple[Outcome, Callable[[], None]]:
    """The study of s.yaml, checked, and what runs it."""
    with contextlib.chdir(project.root), contextlib.redirect_stdout(io.StringIO()):
        config = parser().parse_args(with_arms(["--recipe", "s.yaml", *arguments]))
        study, arms = checked(config, "s", parser())
    lines: list[str] = []
    outcome = Outcome(dataclasses.replace(study, fit=fit, logs=project.root / study.logs, say=lines.append), lines)

    def go() -> None:
        with contextlib.chdir(project.root):
            run_study(outcome.study, arms)

    return outcome, go


def study_of(project: Project, *arguments: str, fit: Fit = fit_here) -> Outcome:
    """Run the study of s.yaml."""
    outcome, go = ready(project, *arguments, fit=fit)
    go()
    return outcome
