"""A plan in words and as a picture."""

from typing import TYPE_CHECKING

from laco_train.collapse.plan import CollapsePlan

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def describe(plan: CollapsePlan) -> list[str]:
    """Lines for a terminal or a log: what went where, what it took away, and what to try if nothing went."""
    p = plan.parameters
    lines = [
        f"Collapsed {plan.source_depth} layers to {plan.depth} "
        f"({p.before:,} to {p.after:,} parameters, {100 * p.ratio:.1f}% removed)"
    ]
    for merge in plan.merges:
        lines.append(
            f"  {plan.merge_rule}: layer {merge.layer} took in the {merge.absorbed} after it, "
            f"similarity {merge.similarity:.4f} (indices from 0, in the model as it then stood)"
        )
    if plan.removed:
        lines.append(f"  removed without a merge: {', '.join(map(str, plan.removed))}")
    tried = [c for c in plan.candidates if c.similarity is not None]
    if plan.candidates and not plan.merges:
        best = max(tried, key=lambda c: c.similarity or -1.0)
        threshold = plan.settings["similarity_threshold"]
        lines.append(
            f"  nothing was accepted: of {len(tried)} merges tried, the best had similarity {best.similarity:.4f} "
            f"(layer {best.layer}), not above T = {threshold}; "
            "lower collapse.similarity_threshold or collapse.layers_per_merge"
        )
    skipped = [c for c in plan.candidates if c.skipped]
    if skipped:
        lines.append(f"  {len(skipped)} windows skipped: {skipped[0].skipped}")
    return lines


def similarity_figure(plan: CollapsePlan) -> "Figure":
    """Similarity of every merge tried, by the layer it would merge into, with the threshold."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    tried = [(c.layer, c.similarity, c.accepted) for c in plan.candidates if c.similarity is not None]
    for accepted, color, marker, label in ((True, "#1a7f37", "o", "accepted"), (False, "#6e7781", "x", "rejected")):
        points = [(layer, similarity) for layer, similarity, kept in tried if kept is accepted]
        if points:
            axes.scatter(*zip(*points, strict=True), color=color, marker=marker, label=label, zorder=3)
    threshold = plan.settings["similarity_threshold"]
    axes.axhline(threshold, color="#b35900", linewidth=1, linestyle="--", label=f"threshold T = {threshold}")
    axes.set_xlabel("layer that takes in those after it, counted from 0")
    axes.set_ylabel("cosine of final hidden states")
    axes.set_title(f"Layer Collapse: {plan.source_depth} to {plan.depth} layers, rule {plan.merge_rule}")
    axes.grid(alpha=0.3)
    axes.legend(loc="best")
    return figure
