"""study.json: what was asked of a study, and how far it is."""

import json
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from laco_train.files import write_whole

State = Literal["waiting", "running", "finished", "failed"]
STUDY_FILE = "study.json"


def now() -> str:
    """The time, in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass
class Entry:
    """One run: an arm with a seed.

    Attributes:
        arm, seed: which.
        folder: its run folder, relative to that of the study.
        state: as of the last change.
        learning_rate: peak; None until it is chosen.
        began, ended: in UTC; `ended` of the last try.
        problem: why it failed, in a line.
    """

    arm: str
    seed: int
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
        arms, seeds: all that the recipe asks for.
        max_tokens: budget of each run.
        evaluate_at: shares of it.
        began, ended: in UTC; `ended` is None while a run is left to do.
        learning_rates: of each arm known so far: `chosen`, `how` (arm, recipe or sweep), and after a sweep `tried`:
            [{`learning_rate`, `loss`}], loss null where that run did not get to its end.
        runs: one for each arm and seed.
    """

    recipe: str
    arms: list[str]
    seeds: list[int]
    max_tokens: int
    evaluate_at: list[float]
    began: str
    ended: str | None = None
    learning_rates: dict[str, dict[str, Any]] = field(default_factory=dict)
    runs: list[Entry] = field(default_factory=list)

    def entry(self, arm: str, seed: int) -> Entry:
        """The run of `arm` with `seed`, added if it is new."""
        for one in self.runs:
            if (one.arm, one.seed) == (arm, seed):
                return one
        self.runs.append(Entry(arm, seed, f"{arm}-seed{seed}/version_0"))
        return self.runs[-1]

    def take_over(self, folder: Path) -> None:
        """Keep the dates and problems that an earlier call of the same study noted in `folder`."""
        path = folder / STUDY_FILE
        if not path.is_file():
            return
        then = json.loads(path.read_text(encoding="utf-8"))
        self.began = then["began"]
        self.learning_rates = {arm: rate for arm, rate in then["learning_rates"].items() if arm in self.arms}
        for values in then["runs"]:
            if values["arm"] in self.arms and values["seed"] in self.seeds:
                vars(self.entry(values["arm"], values["seed"])).update(values)

    def write(self, folder: Path) -> None:
        """Write study.json."""
        folder.mkdir(parents=True, exist_ok=True)
        left = any(one.state != "finished" for one in self.runs)
        self.ended = None if left else max((one.ended or "" for one in self.runs), default="") or None
        write_whole(folder / STUDY_FILE, json.dumps(asdict(self), indent=1) + "\n")
