"""The runs that a study is made of."""

from collections.abc import Sequence
from dataclasses import dataclass

from laco_train.study.settings import StudySettings


def run_name(arm: str, seed: int, ratio: float | None) -> str:
    """Name of a run's folder, such as laco-seed0, or laco-r27-seed0 where 27 % of the parameters are to go."""
    return f"{arm}-seed{seed}" if ratio is None else f"{arm}-r{100 * ratio:g}-seed{seed}"


@dataclass(frozen=True)
class Task:
    """One run.

    Attributes:
        arm, seed: which.
        ratio: share of all parameters to remove; None: as the recipe's collapse section says.
    """

    arm: str
    seed: int
    ratio: float | None = None

    @property
    def name(self) -> str:
        """See `run_name`."""
        return run_name(self.arm, self.seed, self.ratio)


def tasks(study: StudySettings, arms: Sequence[str]) -> list[Task]:
    """Runs of `arms` in the order in which they run: seed by seed, and in each ratio by ratio, the smallest first.

    `original` is no collapse, so it runs once a seed.
    """
    ratios: list[float | None] = [*sorted(study.ratios)] or [None]
    found = []
    for seed in study.seeds:
        if study.ratios and "original" in arms:
            found.append(Task("original", seed))
        collapsed = [arm for arm in arms if arm != "original" or not study.ratios]
        found += [Task(arm, seed, ratio) for ratio in ratios for arm in collapsed]
    return found
