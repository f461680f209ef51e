"""A plan in words and as a picture."""

from typing import TYPE_CHECKING

from laco_train.collapse.plan import CollapsePlan
from laco_train.collapse.unmerged import nothing_merged, thresholds_to_try
from laco_train.collapse.windows import what_helps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What a candidate's score is, by strategy; the others rank by similarity.
_SCORES = {
    "shortgpt": "block influence",
    "angular": "angular distance, in units of pi",
    "sleb": "calibration loss, nats per token",
    "streamline": "cosine of states that enter and leave the block",
}
_SIMILARITY = "cosine of final hidden states"
# Cosines above this look harmless; a loss that rose by more nats than this is not.
_HIGH_SIMILARITY = 0.9
_EXPLODED = 2.0


def describe(plan: CollapsePlan) -> list[str]:
    """Lines for a terminal or a log: what went where, what it took away and cost, and what to try if nothing went."""
    p = plan.parameters
    if plan.strategy == "none":
        return [f"Kept all {plan.depth} layers ({p.before:,} parameters)"]
    lines = [f"Nothing was collapsed: all {plan.depth} layers stay ({p.before:,} parameters)"]
    if not nothing_merged(plan):
        lines = [
            f"Collapsed {plan.source_depth} layers to {plan.depth} "
            f"({p.before:,} to {p.after:,} parameters, {100 * p.ratio:.1f}% removed)"
        ]
    asked = asked_depth(plan)
    if asked is not None:
        at = plan.settings["similarity_threshold"]
        lines.append(
            f"  asked for at most {asked} layers, reached {plan.depth} by {plan.strategy}"
            + (f" at T = {at:.4f}" if at is not None else "")
        )
    for merge in plan.merges:
        lines.append(
            f"  {plan.merge_rule}: layer {merge.layer} took in the {merge.absorbed} after it, "
            f"similarity {merge.similarity:.4f} (indices from 0, in the model as it then stood)"
        )
    if plan.removed:
        lines.append(f"  removed without a merge: {', '.join(map(str, plan.removed))}")
    if plan.refined is not None:
        r = plan.refined
        lines.append(f"  fitted on {r.tokens:,} tokens in {r.seconds:.1f} s; weights in {r.file}")
    if plan.candidates and nothing_merged(plan):
        lines += thresholds_to_try(plan)
    skipped = [c.skipped for c in plan.candidates if c.skipped]
    if skipped:
        helps = what_helps(skipped)
        lines.append(f"  {helps}" if helps else f"  {len(skipped)} windows skipped: {skipped[0]}")
    return lines + _losses(plan)


def asked_depth(plan: CollapsePlan) -> int | None:
    """The number of layers that its settings allowed to remain, from a depth or a ratio; None without a target."""
    depth, ratio = plan.settings.get("target_depth"), plan.settings.get("target_ratio")
    if ratio is None or plan.depth == plan.source_depth:
        return depth
    layer = (plan.parameters.before - plan.parameters.after) / (plan.source_depth - plan.depth)
    return plan.source_depth - round(ratio * plan.parameters.before / layer)


def _losses(plan: CollapsePlan) -> list[str]:
    c = plan.calibration
    if c is None or c.loss_before is None or c.loss_after is None or plan.depth == plan.source_depth:
        return []
    lines = [f"  calibration loss {c.loss_before:.3f} nats per token before, {c.loss_after:.3f} after"]
    targeted = plan.settings.get("target_depth") or plan.settings.get("target_ratio")
    rise = c.loss_after - c.loss_before
    least = min((merge.similarity for merge in plan.merges), default=-1.0)
    # without a target every merge was above the T that the user asked for
    if plan.merges and rise > _EXPLODED and (least >= _HIGH_SIMILARITY or not targeted):
        lines.append(
            f"  warning: similarity stayed at {least:.4f} or above, but the calibration loss rose by {rise:.2f} nats: "
            "similarity alone does not promise quality; train on, raise collapse.similarity_threshold, or rank by loss "
            "(collapse.strategy: greedy, collapse.criterion: loss)"
        )
    return lines


def similarity_figure(plan: CollapsePlan) -> "Figure":
    """What every window tried was ranked by (similarity, else its score), by its first layer, with the threshold."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    scored = plan.strategy in _SCORES
    tried = [(c.layer, c.score if scored else c.similarity, c.accepted) for c in plan.candidates]
    for accepted, color, marker, label in ((True, "#1a7f37", "o", "accepted"), (False, "#9a9a9a", "x", "rejected")):
        points = [(layer, value) for layer, value, kept in tried if kept is accepted and value is not None]
        if points:
            axes.scatter(*zip(*points, strict=True), color=color, marker=marker, label=label, zorder=3)
    threshold = plan.settings["similarity_threshold"]
    if threshold is not None:
        axes.axhline(threshold, color="#b35900", linewidth=1, linestyle="--", label=f"threshold T = {threshold:.4f}")
    axes.set_xlabel("first layer of the window (from 0, in the model as it then stood)")
    axes.set_ylabel(_SCORES.get(plan.strategy, _SIMILARITY))
    axes.set_title(f"{plan.strategy}: {plan.source_depth} to {plan.depth} layers, rule {plan.merge_rule}")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best")
    return figure
