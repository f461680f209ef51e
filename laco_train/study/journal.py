"""study.json: what was asked of a study, and how far it is."""

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from laco_train.files import write_whole
from laco_train.study.tasks import Task

State = Literal["waiting", "running", "finished", "failed"]
STUDY_FILE = "study.json"


def now() -> str:
    """The time, in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass
class Entry:
    """One run.

    Attributes:
        arm, seed, ratio: see `Task`.
        folder: its run folder, relative to that of the study.
        state: as of the last change.
        learning_rate: peak; None until it is chosen.
        began, ended: in UTC; `ended` of the last try.
        problem: why it failed, in a line.
    """

    arm: str
    seed: int
    ratio: float | None
    folder: str
    state: State = "waiting"
    learning_rate: float | None = None
    began: str | None = None
    ended: str | None = None
    problem: str | None = None


@dataclass
class Journal:
    """What study.json says.

    Attributes:
        recipe: name of the study's recipe.
        arms, seeds, ratios: all that the recipe asks for.
        max_tokens: budget of each run.
        evaluate_at: shares of it.
        began, ended: in UTC; `ended` is None while a run is left to do.
        learning_rates: of each arm known so far: `chosen`, `how` (arm, recipe or sweep), and after a sweep `tried`:
            [{`learning_rate`, `loss`}], loss null where that run did not get to its end.
        runs: all, in the recipe's order.
    """

    recipe: str
    arms: list[str]
    seeds: list[int]
    ratios: list[float]
    max_tokens: int
    evaluate_at: list[float]
    began: str
    ended: str | None = None
    learning_rates: dict[str, dict[str, Any]] = field(default_factory=dict)
    runs: list[Entry] = field(default_factory=list)

    def entry(self, task: Task) -> Entry:
        """The run of `task`, added if it is new."""
        folder = f"{task.name}/version_0"
        for one in self.runs:
            if one.folder == folder:
                return one
        self.runs.append(Entry(task.arm, task.seed, task.ratio, folder))
        return self.runs[-1]

    def take_over(self, folder: Path, arms: Collection[str]) -> None:
        """Take what other calls of the same study noted of `arms` in `folder`, now or earlier."""
        path = folder / STUDY_FILE
        if not path.is_file():
            return
        then = json.loads(path.read_text(encoding="utf-8"))
        self.began = then["began"]
        self.learning_rates |= {arm: rate for arm, rate in then["learning_rates"].items() if arm in arms}
        noted = {values["folder"]: values for values in then["runs"]}
        for entry in self.runs:
            if entry.arm in arms:
                vars(entry).update(noted.get(entry.folder, {}))

    def write(self, folder: Path) -> None:
        """Write study.json; the caller holds it alone."""
        left = any(one.state != "finished" for one in self.runs)
        self.ended = None if left else max((one.ended or "" for one in self.runs), default="") or None
        write_whole(folder / STUDY_FILE, json.dumps(asdict(self), indent=1) + "\n")
