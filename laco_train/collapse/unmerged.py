"""A search that accepted nothing: what it would have accepted at which threshold, and why no fit goes on from there."""

from laco_train.collapse.plan import Candidate, CollapsePlan
from laco_train.collapse.windows import what_helps
from laco_train.errors import InputError

_NONE = "collapse.strategy: none trains the whole original"


def nothing_merged(plan: CollapsePlan) -> bool:
    """Whether `plan` leaves all layers although it was to collapse some."""
    return plan.depth == plan.source_depth and plan.strategy != "none"


def refuse_nothing_merged(plan: CollapsePlan) -> None:
    """Refuse to train the whole original for want of a merge.

    Raises:
        InputError: the search that made `plan` accepted nothing; the line names the highest similarity that it found.
    """
    if not nothing_merged(plan):
        return
    tried = _measured(plan)
    if not tried:
        problem = "no merge could be measured in this type, so that nothing would be collapsed; set another"
        raise InputError("model.dtype", f"{problem}, such as float32; {_NONE}")
    similarity, best = max(tried, key=lambda each: each[0])
    best_at = f"{similarity:.4f} (layers {best.layer} to {best.layer + best.absorbed}, from 0)"
    helps = what_helps(c.skipped for c in plan.candidates)
    raise InputError(
        "collapse.similarity_threshold",
        f"no merge is above T = {plan.settings['similarity_threshold']}, so that nothing would be collapsed; the "
        f"highest similarity is {best_at}: set it below that, or lower collapse.layers_per_merge; "
        f"{helps + '; ' if helps else ''}{_NONE}",
    )


def thresholds_to_try(plan: CollapsePlan) -> list[str]:
    """Lines on a search that accepted nothing: its best merge, and which would come first as T falls."""
    tried = _measured(plan)
    if not tried:
        return ["  nothing was accepted: no merge could be measured"]
    first = _first_accepted(tried, in_order=plan.strategy == "laco")
    similarity, best = first[0]
    return [
        f"  nothing was accepted: of {len(tried)} merges tried, the best had similarity {similarity:.4f} "
        f"(layer {best.layer}), not above T = {plan.settings['similarity_threshold']}; "
        "lower collapse.similarity_threshold or collapse.layers_per_merge",
        *(
            f"  below T = {one:.4f} layers {c.layer} to {c.layer + c.absorbed} would merge first"
            for one, c in first[:3]
        ),
    ]


def _measured(plan: CollapsePlan) -> list[tuple[float, Candidate]]:
    return [(c.similarity, c) for c in plan.candidates if c.similarity is not None]


def _first_accepted(tried: list[tuple[float, Candidate]], *, in_order: bool) -> list[tuple[float, Candidate]]:
    """As T falls: below which similarity which candidate is the first to be accepted.

    Args:
        tried: similarities and candidates of a search that accepted none.
        in_order: the search takes the first that is above T, and not the best.
    """
    ahead, result = tried, []
    while ahead:
        index = max(range(len(ahead)), key=lambda i: ahead[i][0])
        result.append(ahead[index])
        ahead = ahead[:index] if in_order else []
    return result
