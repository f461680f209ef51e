"""Everything that one call of `evaluate` found, and what of it is compared. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from laco_train.evaluation.groups import GROUPS, Group, group_of
from laco_train.evaluation.perplexity import Perplexity
from laco_train.evaluation.scores import (
    Difference,
    Estimate,
    TaskScore,
    difference,
    kept,
    mean_difference,
    mean_of,
)


@dataclass(frozen=True)
class ModelResult:
    """One model.

    Attributes:
        name: short, unlike those of the others.
        source: as the user named it.
        layers: decoder layers.
        parameters: all of them.
        dtype: of the weights, while it was measured.
        scores: one a task, in the order of `Evaluation.tasks`.
        perplexity: of the text; None without one.
        written: its continuation of each prompt.
    """

    name: str
    source: str
    layers: int
    parameters: int
    dtype: str
    scores: tuple[TaskScore, ...]
    perplexity: Perplexity | None
    written: tuple[str, ...]


@dataclass(frozen=True)
class Compared:
    """Accuracy of a model on a task or over several, beside the baseline's.

    Attributes:
        estimate: accuracy.
        kept: share of the baseline's accuracy; None without a baseline, or for one of 0.
        difference: from the baseline; None without one.
    """

    estimate: Estimate
    kept: float | None
    difference: Difference | None


@dataclass(frozen=True)
class Evaluation:
    """All models, the baseline first.

    Attributes:
        models: in the order of the tables.
        has_baseline: whether the first is one.
        prompts: that the models wrote on after.
        device: in words.
        limit: most questions of a task; None: all.
        versions: of the libraries.
    """

    models: tuple[ModelResult, ...]
    has_baseline: bool
    prompts: tuple[str, ...]
    device: str
    limit: int | None
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names, in the order in which they ran."""
        return tuple(score.task for score in self.models[0].scores)

    @property
    def groups(self) -> dict[Group, tuple[str, ...]]:
        """Tasks of each group that has any, in the paper's order of groups."""
        found = {group: tuple(task for task in self.tasks if group_of(task) == group) for group in GROUPS}
        return {group: tasks for group, tasks in found.items() if tasks}

    def score(self, model: ModelResult, task: str) -> TaskScore:
        """What `model` got on `task`."""
        return model.scores[self.tasks.index(task)]

    def baseline_of(self, model: ModelResult) -> ModelResult | None:
        """What `model` is compared with; None for the baseline itself, and without one."""
        first = self.models[0]
        return first if self.has_baseline and model is not first else None

    def compared(self, model: ModelResult, tasks: tuple[str, ...]) -> Compared:
        """Mean accuracy of `model` over `tasks`, each counting the same, beside the baseline's."""
        mine = [self.score(model, task) for task in tasks]
        estimate = mean_of([one.estimate for one in mine])
        baseline = self.baseline_of(model)
        if baseline is None:
            return Compared(estimate, None, None)
        others = [self.score(baseline, task) for task in tasks]
        apart = mean_difference([difference(one, other) for one, other in zip(mine, others, strict=True)])
        return Compared(estimate, kept(estimate, mean_of([one.estimate for one in others])), apart)
