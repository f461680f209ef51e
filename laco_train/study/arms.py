"""From a study's recipe to the recipes of fit that its arms are; pure functions on plain dictionaries."""

import copy
from collections.abc import Mapping
from typing import Any

from laco_train.study.settings import ARMS, StudySettings
from laco_train.study.untrained import CALLBACK, UNTRAINED

Recipe = dict[str, Any]

UNCOLLAPSED = {
    "strategy": "none",
    "target_depth": None,
    "target_ratio": None,
    "similarity_threshold": None,
    "exact": False,
    "criterion": "similarity",
    "refine": {"tokens": 0},
}
"""The collapse section of the arm `original`, as far as it can't be that of the others."""
_CHECKPOINTS = "laco_train.callbacks.best_checkpoint.BestAndNewestCheckpoint"


def arm_recipe(
    shared: Mapping[str, Any],
    study: StudySettings,
    arm: str,
    seed: int,
    rate: float | None,
    depth: int | None = None,
) -> Recipe:
    """The recipe of one run.

    Args:
        shared: the study's recipe without its section `study`, all keys filled in.
        study: that section.
        arm: one of its arms.
        seed: sets the order of the data too.
        rate: peak learning rate; None: that of the arm, or else the shared one.
        depth: layers to collapse to; None: as the recipe says.
    """
    recipe = merged(shared, built_in(arm))
    for changes in changes_of(study, arm):
        recipe = merged(recipe, changes)
    if recipe["collapse"].get("remove") is not None:
        untargeted = {key: None for key in ("target_depth", "target_ratio", "similarity_threshold")}
        recipe = merged(recipe, {"collapse": {**untargeted, "exact": False}})  # the layers named are the target
    recipe = merged(recipe, {"seed_everything": seed, "data": {"seed": seed}})
    if rate is not None:
        recipe = merged(recipe, {"model": {"optimizer": {"learning_rate": rate}}})
    if depth is not None:
        recipe = merged(recipe, {"collapse": {"target_depth": depth}})
    if study.sweeps:
        recipe = merged(recipe, {"data": {"sweep_fraction": study.sweep_fraction}})
    if recipe["budget"]["max_tokens"] == 0:
        # a refinement is no training, but comes off the budget
        budget = {"max_tokens": UNTRAINED["budget"]["max_tokens"] + recipe["collapse"]["refine"]["tokens"]}
        return with_callbacks(merged(merged(recipe, UNTRAINED), {"budget": budget}), [CALLBACK])
    return with_trainer(recipe)


def built_in(arm: str) -> Recipe:
    """What makes an arm the arm that it is."""
    if arm not in ARMS:
        return {}
    if arm == "original":
        return {"collapse": UNCOLLAPSED}
    if arm == "scratch":
        return merged(built_in("laco"), {"model": {"from_scratch": True}})
    # a merge of several layers may overshoot the target; the criterion is greedy's alone
    exact = {"exact": True} if arm in ("laco", "greedy") else {}
    criterion = {} if arm == "greedy" else {"criterion": "similarity"}
    return {"collapse": {"strategy": arm, **exact, **criterion}}


def changes_of(study: StudySettings, arm: str) -> list[Recipe]:
    """What the study's recipe changes for an arm: `scratch` has the plan of `laco`, and so its collapse section."""
    laco = study.arms.get("laco") or {}
    inherited = [{"collapse": laco["collapse"]}] if arm == "scratch" and "collapse" in laco else []
    return [*inherited, study.arms.get(arm) or {}]


def own_rate(study: StudySettings, arm: str) -> float | None:
    """The learning rate that an arm names itself."""
    rate: Any = study.arms.get(arm) or {}
    for key in ("model", "optimizer", "learning_rate"):
        rate = (rate or {}).get(key)
    return None if rate is None else float(rate)


def with_trainer(recipe: Recipe) -> Recipe:
    """The recipe without a progress bar, as it would go to a file, and with the best checkpoint kept too."""
    trainer = recipe.get("trainer") or {}
    told = trainer.get("enable_checkpointing") is False or "Checkpoint" in str(trainer.get("callbacks"))
    return with_callbacks(recipe, [] if told else [_CHECKPOINTS])


def with_callbacks(recipe: Recipe, added: list[str]) -> Recipe:
    """The recipe without a progress bar, and with `added` callbacks, by class path, after its own."""
    named = (recipe.get("trainer") or {}).get("callbacks") or []
    callbacks = [*(named if isinstance(named, list) else [named]), *({"class_path": path} for path in added)]
    return merged(recipe, {"trainer": {"enable_progress_bar": False, "callbacks": callbacks or None}})


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> Recipe:
    """`below` with what `above` says put over it, section by section; neither is changed."""
    result: Recipe = copy.deepcopy(dict(below))
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else copy.deepcopy(value)
    return result


def leaves(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by their whole keys, such as data.seed."""
    found: dict[str, Any] = {}
    for key, value in recipe.items():
        if isinstance(value, Mapping) and value:
            found |= leaves(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
