"""The study section of a recipe, as data; imports no torch."""

import re
from dataclasses import dataclass, field
from typing import Any

from laco_train.checks import check_static
from laco_train.errors import InputError
from laco_train.settings import BudgetSettings, CollapseSettings
from laco_train.study.curves import RUN_FOLDER

RIVALS = ("shortgpt", "sleb", "angular", "tail", "streamline", "greedy")
ARMS = ("original", "laco", *RIVALS, "scratch")
"""original: trained as it is; scratch: the shape of laco from random weights; the others: a strategy of collapse.
An arm of another name says its collapse.strategy itself, or its collapse.remove."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
OWN_SECTIONS = ("model", "collapse", "speed")
"""What arms may differ in: all else is what makes them comparable."""


@dataclass(frozen=True)
class StudySettings:
    """Arms on the same data, evaluation points and budget; each is a fit of the recipe's other sections."""

    arms: dict[str, Any] = field(default_factory=lambda: {name: {} for name in ARMS})
    """Arms and what each changes in model, collapse and speed; a name of your own must say collapse.strategy."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Each arm runs once a seed, which sets the order of the data and every random number."""
    ratios: list[float] = field(default_factory=list)
    """Shares of all parameters to remove, to the nearest whole layer, each arm at each; empty: as collapse says."""
    learning_rates: list[float] = field(default_factory=list)
    """Rates to choose from for each arm that names none itself, at the middle ratio; empty: that of the optimizer."""
    sweep_share: float = 0.1
    """Share of the budget that each rate of that choice gets; above 0, 1 at most. Small ones favour low rates."""
    sweep_fraction: float = 0.02
    """Share of train's documents that only this choice is validated on: never trained on, never reported."""
    keep_going: bool = True
    """After an arm that failed, go on with the next one."""

    @property
    def sweeps(self) -> bool:
        """Whether there are learning rates to choose from."""
        return len(self.learning_rates) > 1


def check_study(s: StudySettings, collapse: CollapseSettings, budget: BudgetSettings, tokens_a_step: int) -> None:
    """Refuse a study that could not be run or whose arms could not be compared.

    Args:
        tokens_a_step: of an optimizer step, over all devices.

    Raises:
        InputError: names the key.
    """
    check_arms(s)
    check_static("study.seeds", len(s.seeds) > 0, "is empty; give at least one")
    check_static("study.seeds", len(set(s.seeds)) == len(s.seeds), f"names a seed twice: {s.seeds}")
    check_static("study.seeds", min(s.seeds, default=0) >= 0, f"must be 0 or more, is {s.seeds}")
    rates = s.learning_rates
    check_static("study.learning_rates", all(rate > 0 for rate in rates), f"must be above 0, is {rates}")
    check_static("study.learning_rates", len(set(rates)) == len(rates), f"names a rate twice: {rates}")
    check_static("study.sweep_share", 0 < s.sweep_share <= 1, f"must be above 0, 1 at most, is {s.sweep_share}")
    check_static("study.sweep_fraction", 0 < s.sweep_fraction < 1, f"must be above 0, below 1, is {s.sweep_fraction}")
    check_targets(s, collapse)
    if budget.max_tokens == 0:
        check_untrained(s)
    else:
        check_points(s, budget, tokens_a_step)


def check_targets(s: StudySettings, collapse: CollapseSettings) -> None:
    """Refuse a study whose arms have no depth in common, or are told two."""
    ratios = s.ratios
    check_static("study.ratios", all(0 < r < 1 for r in ratios), f"must be above 0 and below 1, is {ratios}")
    check_static("study.ratios", len(set(ratios)) == len(ratios), f"names a ratio twice: {ratios}")
    named = {"collapse": collapse.target_depth is not None or collapse.target_ratio is not None}
    named |= {f"study.arms.{arm}.collapse": _names_target(changes) for arm, changes in s.arms.items()}
    for where, told in named.items():
        check_static(f"{where}.target_depth", not (told and ratios), "goes not with study.ratios; drop it, or these")
    targeted = bool(ratios) or named["collapse"]
    check_static("collapse.target_depth", targeted, "is what all arms are collapsed to; give it or target_ratio")


def _names_target(changes: Any) -> bool:
    own = (changes or {}).get("collapse") or {}
    return any(own.get(key) is not None for key in ("target_depth", "target_ratio"))


def check_untrained(s: StudySettings) -> None:
    """Refuse what makes no sense where nothing is trained."""
    key = "budget.max_tokens"
    check_static(key, bool(s.ratios), "0 measures collapses alone, which needs study.ratios; add them, or raise it")
    check_static(key, "scratch" not in s.arms, "0 trains nothing, so study.arms.scratch has nothing to show; drop it")
    check_static(key, not s.sweeps, "0 trains nothing, so there is no study.learning_rates to choose from; drop them")


def check_arms(s: StudySettings) -> None:
    """Refuse arms that are unknown, or that change what all must share."""
    check_static("study.arms", len(s.arms) > 0, f"is empty; the arms are {', '.join(ARMS)}")
    for arm, changes in s.arms.items():
        if not isinstance(changes, dict | None):
            raise InputError(f"study.arms.{arm}", "must hold sections, such as collapse: {merge_rule: mean}, or {}")
        for section, own in (changes or {}).items():
            key = f"study.arms.{arm}.{section}"
            check_static(key, section in OWN_SECTIONS, f"can't differ: arms change only {', '.join(OWN_SECTIONS)}")
            told = f"is a section, but is {own!r}; write its keys, or leave it out"
            check_static(key, isinstance(own, dict), told)
        if not names_layers(changes):
            known(arm, ARMS, "study.arms")
        named = isinstance(arm, str) and _NAME.fullmatch(arm) is not None  # YAML gives 1 as a number
        check_static("study.arms", named, f"{arm!r} is no name for a folder")
        found = RUN_FOLDER.fullmatch(f"{arm}-seed0")
        if found is not None and found["percent"] is not None:  # its runs would be read as those of a ratio
            raise InputError(
                "study.arms", f"{arm!r} ends as the folder of a ratio does (laco-r27); end it otherwise, as in lora_r16"
            )


def names_layers(changes: Any) -> bool:
    """Whether an arm says itself how its layers are chosen, so that it may have any name."""
    own = (changes or {}).get("collapse") or {}
    return any(own.get(key) is not None for key in ("strategy", "remove"))


def known(arm: str, arms: tuple[str, ...], key: str) -> None:
    """Refuse an arm that is not among `arms`."""
    check_static(key, arm in arms, f"there is no arm {arm!r}; the arms are {', '.join(arms)}")


def check_points(s: StudySettings, budget: BudgetSettings, tokens_a_step: int) -> None:
    """Refuse a budget whose evaluation points, or whose sweep, would fall together in one step."""
    tokens = budget.max_tokens
    if tokens is None:
        raise InputError("budget.max_tokens", "is null; a study needs the tokens that each arm trains on")
    for fewer, share in zip([0.0, *sorted(budget.evaluate_at)], sorted(budget.evaluate_at), strict=False):
        apart = (share - fewer) * tokens >= tokens_a_step * (1 - 1e-9)
        check_static(
            "budget.max_tokens",
            apart,
            f"{tokens:,} tokens are too few for evaluation at {fewer:g} and {share:g} of them: "
            f"a step takes {tokens_a_step:,}; raise it or drop a point of budget.evaluate_at",
        )
    enough = not s.sweeps or s.sweep_share * tokens >= tokens_a_step
    check_static("study.sweep_share", enough, f"is less than a step of {tokens_a_step:,} tokens; raise it")
