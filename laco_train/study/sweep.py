"""The learning rate of an arm: the one that does best on documents that are never reported and never trained on."""

import math
from collections.abc import Mapping

from laco_train.study.arms import Recipe, merged
from laco_train.study.settings import StudySettings


def sweep_recipe(recipe: Recipe, study: StudySettings, rate: float) -> Recipe:
    """The short run of fit that tries `rate` for an arm.

    Args:
        recipe: of the arm's run.
        rate: peak learning rate.
    """
    refined = recipe["collapse"]["refine"]["tokens"]  # comes off the budget, and before any rate
    tokens = refined + math.ceil(study.sweep_share * (recipe["budget"]["max_tokens"] - refined))
    return merged(
        recipe,
        {
            "model": {"optimizer": {"learning_rate": rate}},
            "data": {"sweep_fraction": study.sweep_fraction, "validate_on": "sweep"},
            "budget": {"max_tokens": tokens, "evaluate_at": []},
            "evaluation": {"tasks": [], "samples": False, "prompts": None},
            "export": {"enabled": False},
        },
    )


def best_rate(losses: Mapping[float, float | None]) -> float | None:
    """The rate of the lowest loss; None where none was finished.

    Args:
        losses: at the end of the short run of each rate; None: it did not get there.
    """
    done = {rate: loss for rate, loss in losses.items() if loss is not None}
    return min(done, key=lambda rate: done[rate]) if done else None
