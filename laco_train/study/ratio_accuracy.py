"""Mean accuracy of each arm over the share of the parameters that is removed."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from laco_train.evaluation.record import Accuracy
from laco_train.evaluation.scores import Difference, Estimate, is_chance, kept
from laco_train.study.accuracy import Moment, accuracy_curve
from laco_train.study.curves import Arm, Run
from laco_train.study.ratios import ORIGINAL, QUANTITIES, OverRatios, Quantity, by_level


@dataclass(frozen=True)
class MeanAccuracies:
    """Accuracies of all levels that answered the same questions.

    Attributes:
        tasks: that the means are over, each counting the same; empty where none was measured.
        found: by key of a quantity, arm and ratio; those that were not measured are absent.
        left_out: (arm, ratio) of levels that were measured on other tasks or questions.
    """

    tasks: tuple[str, ...]
    found: dict[tuple[str, str, float], Moment]
    left_out: tuple[tuple[str, float], ...]

    @property
    def quantities(self) -> list[Quantity]:
        """The moments, named as those of the losses, at which some arm was measured."""
        return [q for q in QUANTITIES if any(key == q.key and arm != ORIGINAL for key, arm, _ in self.found)]

    @property
    def label(self) -> str:
        """What the means are, in words."""
        several = len(self.tasks) > 1
        return f"mean accuracy over {len(self.tasks)} tasks" if several else f"accuracy on {self.tasks[0]}"

    @property
    def title(self) -> str:
        """The label with a capital letter."""
        return self.label[0].upper() + self.label[1:]

    @property
    def baseline(self) -> Estimate | None:
        """The original's: before training, as the paper has it, else after; None if it was not measured."""
        known = (self.at(q.key, ORIGINAL, 0.0) for q in QUANTITIES)
        return next((one.estimate for one in known if one is not None), None)

    def at(self, key: str, arm: str, ratio: float) -> Moment | None:
        """The accuracy of an arm at a ratio; None if it is not known there."""
        return self.found.get((key, arm, ratio))

    def kept(self, one: Moment) -> float | None:
        """Share of the original's accuracy that is left; None if the original was not measured."""
        return None if self.baseline is None else kept(one.estimate, self.baseline)

    def chance(self, key: str) -> float | None:
        """Share right of uniform guesses, the same for all; None where answers are free text."""
        return next((one.chance for (when, _, _), one in self.found.items() if when == key), None)

    def ranked(self, over: OverRatios, ratio: float, key: str) -> list[tuple[str, Moment]]:
        """(arm, accuracy) of collapsed models at a ratio, the highest first."""
        each = [(line.name, self.at(key, line.name, ratio)) for line in over.lines if line.is_collapsed]
        known = [(name, one) for name, one in each if one is not None]
        return sorted(known, key=lambda pair: -pair[1].estimate.value)


def mean_accuracies(runs: Sequence[Run]) -> MeanAccuracies:
    """Accuracies of `runs` at each ratio, right after the collapse and at the end of training.

    They compare only on the same questions, so only levels all of whose runs answered those that most levels did
    are taken.

    Args:
        runs: finished, as for `over_ratios`.
    """
    levels = by_level(runs)
    asked = {place: _asked(those) for place, those in levels.items() if any(run.accuracies for run in those)}
    most = Counter(one for one in asked.values() if one is not None).most_common(1)
    if not most:
        return MeanAccuracies((), {}, tuple(asked))
    shared = most[0][0]
    tasks = tuple(dict.fromkeys(one.task for run in runs for one in run.accuracies if _question(one) in shared))
    found = {}
    for (name, ratio), questions in asked.items():
        if questions == shared:
            arm = Arm(name, tuple(levels[name, ratio]))
            found.update({(key, name, ratio): one for key, one in _ends(arm, tasks).items()})
    return MeanAccuracies(tasks, found, tuple(place for place, questions in asked.items() if questions != shared))


def _question(one: Accuracy) -> tuple[str, str]:
    return one.task, one.questions_sha256


def _asked(runs: Sequence[Run]) -> frozenset[tuple[str, str]] | None:
    """(task, hash of its questions) of all that `runs` answered; None if they differ in the questions of a task."""
    found = frozenset(_question(one) for run in runs for one in run.accuracies)
    return found if len(found) == len({task for task, _ in found}) else None


def _ends(arm: Arm, tasks: Sequence[str]) -> dict[str, Moment]:
    """The mean accuracy of `arm` right after its collapse and after its last token, as far as it was measured there."""
    curve, points = accuracy_curve(arm, tasks), arm.runs[0].points
    first, last = points[0].tokens, points[-1].tokens
    before, after = ([one for one in curve if one.tokens == tokens] for tokens in (first, last))
    return {**({"before": before[0]} if before else {}), **({"after": after[-1]} if after and last > first else {})}


def within_noise(ranked: Sequence[tuple[str, Moment]]) -> list[str]:
    """Arms that the highest, which comes first, is not ahead of by more than noise, itself included."""
    highest = ranked[0][1].estimate
    return [name for name, one in ranked if one is ranked[0][1] or _apart(highest, one.estimate).within_noise]


def _apart(one: Estimate, other: Estimate) -> Difference:
    """`one` minus `other`, not paired: a run keeps no single answers."""
    known = one.error is not None and other.error is not None
    error = math.hypot(one.error or 0.0, other.error or 0.0) if known else None
    return Difference(one.value - other.value, error, paired=False)


def accuracy_columns(means: MeanAccuracies) -> list[str]:
    """Names of what `accuracy_values` gives; none where nothing was measured."""
    names = ("accuracy", "accuracy_error", "kept")
    return [f"{name}_{q.key}" for q in QUANTITIES for name in names] if means.quantities else []


def accuracy_values(means: MeanAccuracies, arm: str, ratio: float) -> list[float | None]:
    """Accuracy, its standard error and the share kept of a level, at each moment; none where nothing was measured."""
    each = [means.at(q.key, arm, ratio) for q in QUANTITIES] if means.quantities else []
    return [
        value
        for one in each
        for value in ((None,) * 3 if one is None else (one.estimate.value, one.estimate.error, means.kept(one)))
    ]


def accuracy_json(means: MeanAccuracies, arm: str, ratio: float) -> dict[str, Any]:
    """Mean accuracies of a level, in plain types, by key of a quantity; None where it was not measured."""
    return {
        q.key: None
        if (one := means.at(q.key, arm, ratio)) is None
        else {
            "accuracy": one.estimate.value,
            "error": one.estimate.error,
            "chance": one.chance,
            "no_better_than_chance": is_chance(one.estimate, one.chance),
            "kept": means.kept(one),
        }
        for q in QUANTITIES
    }
