"""Collapse after collapse: a plan whose lineage names the layers of the first model, whatever was trained between."""

import dataclasses
import json
from pathlib import Path

from laco_train.collapse.merge import COMPOSED
from laco_train.collapse.plan import CollapsePlan, Parameters, Round, dropped_by, joined_lineages
from laco_train.errors import InputError
from laco_train.files import home

_PLAN, _SUMMARY = "collapse_plan.json", "summary.json"


def compose(first: CollapsePlan, second: CollapsePlan, trained: int | None) -> CollapsePlan:
    """`second` seen from the model that `first` began with.

    It belongs to that model and says where layers come from; it can't be applied, as training lay between. Composing is
    associative. What was searched and measured in a round is told by the round's own plan alone.

    Args:
        first: left the model that `second` collapsed; either may be composed already.
        second: strategy, settings and what else a plan has but one of are taken from it.
        trained: tokens trained on between them; None: not recorded.

    Raises:
        ValueError: `second` is a plan of another depth than `first` left.
    """
    if first.depth != second.source_depth:
        raise ValueError(f"a plan that leaves {first.depth} layers and one of {second.source_depth} don't compose")
    opening, *others = rounds_of(second)
    rounds = (*rounds_of(first), dataclasses.replace(opening, trained=trained), *others)
    lineage = joined_lineages(first.lineage, second.lineage)
    before, after = first.parameters.before, second.parameters.after
    return dataclasses.replace(
        second,
        source=first.source,
        source_fingerprint=first.source_fingerprint,
        dtype=first.dtype,
        round=len(rounds) - 1,
        source_depth=first.source_depth,
        merge_rule=COMPOSED,
        merges=(),
        removed=dropped_by(first.source_depth, lineage),
        candidates=(),
        lineage=lineage,
        parameters=Parameters(before, after, 1 - after / before),
        calibration=None,
        refined=None,
        refined_weights=None,
        rounds=rounds,
    )


def rounds_of(plan: CollapsePlan) -> tuple[Round, ...]:
    """The collapses of `plan`, in order; one unless it is composed."""
    if plan.rounds:
        return plan.rounds
    return (Round(plan.strategy, plan.source_depth, plan.depth, plan.merge_rule, plan.merges, plan.removed, trained=0),)


def plan_of_source(source: str, depth: int) -> CollapsePlan | None:
    """The plan in `source`, if that is a folder that a collapse left.

    Raises:
        InputError: the plan can't be read, or leaves another depth than `depth`, which the model has.
    """
    path = home(source) / _PLAN
    if not path.is_file():
        return None
    plan = CollapsePlan.load(path)
    if plan.depth != depth:
        raise InputError("model.source", f"{path} leaves {plan.depth} layers, but the model has {depth}; mend either")
    return plan


def from_the_first_model(plan: CollapsePlan, source: str) -> CollapsePlan:
    """`plan` composed with that of its source, if `source` is a folder that a collapse left; else `plan` itself.

    Tokens trained on since that collapse are those of the run whose export the folder is.

    Raises:
        InputError: see `plan_of_source`.
    """
    first = plan_of_source(source, plan.source_depth)
    if first is None:
        return plan
    return compose(first, plan, _tokens_of_run(home(source).parent / _SUMMARY))


def _tokens_of_run(summary: Path) -> int | None:
    try:
        values = json.loads(summary.read_text(encoding="utf-8"))
        tokens = values.get("rounds", [values])[-1]["tokens"]  # a run of rounds exports what its last round trained
    except (OSError, ValueError, LookupError, AttributeError):
        return None
    return tokens if isinstance(tokens, int) else None
