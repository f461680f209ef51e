"""What the end of a run says of training."""

import pytest

from laco_train.cli.summary import effect_of_training
from tests.cli.runs import Project


@pytest.mark.parametrize(
    ("losses", "trained", "said"),
    [
        ({"original": 3.0, "collapsed": 5.0}, 3.5, "gave back 75% of the loss that the collapse cost."),
        ({"original": 3.0, "collapsed": 5.0}, 5.0, "gave back 0% of the loss that the collapse cost."),
        ({"original": 3.0, "collapsed": 3.05}, 3.0, None),
        ({"collapsed": 5.0}, 4.0, None),
        ({"original": 3.0, "collapsed": 5.0}, 5.00004, "gave back 0% of the loss that the collapse cost."),
    ],
)
def test_what_became_of_the_loss(losses: dict[str, float], trained: float, said: str | None) -> None:
    assert effect_of_training(losses, trained) == said


@pytest.mark.parametrize("losses", [{"original": 3.0}, {"original": 4.95}, {"original": 6.0}, {}])
def test_a_loss_above_that_after_the_collapse_is_told(losses: dict[str, float]) -> None:
    effect = effect_of_training({**losses, "collapsed": 5.0}, 5.0002)
    assert effect is not None
    assert effect.startswith("made it worse: validation loss 5.0002, but 5.0000 right after the collapse")


def test_a_fit_that_makes_it_worse_says_so_in_one_line(project: Project) -> None:
    run = project.fit("--model.optimizer.learning_rate", "1.0")
    losses = run.summary()["losses"]
    assert losses["trained"] > losses["collapsed"] + 0.1
    (line,) = [line for line in run.result.out.splitlines() if "made it worse" in line]
    assert line.startswith("Training on 384 tokens (6 steps) made it worse: validation loss")
    assert line.endswith("lower model.optimizer.learning_rate, or name other text.")
