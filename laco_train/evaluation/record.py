"""What a run keeps of its evaluations, in its checkpoints and its summary.json. Pure."""

from dataclasses import dataclass

from laco_train.evaluation.scores import TaskScore


@dataclass(frozen=True)
class Accuracy:
    """A model on a task at one moment of its training; the fields of an entry of `evaluation` in summary.json.

    Attributes:
        step: optimizer steps before it.
        tokens: tokens trained on before it.
        task, metric, chance, data: see `TaskScore`.
        value: share of the questions that was right.
        error: its standard error; None for a single question.
        questions: how many.
        questions_sha256: equal means the same questions.
    """

    step: int
    tokens: int
    task: str
    metric: str
    value: float
    error: float | None
    questions: int
    questions_sha256: str
    chance: float | None
    data: str


def accuracy_of(score: TaskScore, step: int, tokens: int) -> Accuracy:
    """`score` without the single answers, after so many optimizer steps and tokens."""
    estimate = score.estimate
    return Accuracy(
        step=step,
        tokens=tokens,
        task=score.task,
        metric=score.metric,
        value=estimate.value,
        error=estimate.error,
        questions=len(score.values),
        questions_sha256=score.questions,
        chance=score.chance,
        data=score.data,
    )
