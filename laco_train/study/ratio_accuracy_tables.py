"""Mean accuracies over ratios, in sentences and as tables."""

from laco_train.evaluation.report import CHANCE
from laco_train.evaluation.scores import CONFIDENCE, is_chance
from laco_train.study.accuracy import Moment, accuracy_cell
from laco_train.study.ratio_accuracy import MeanAccuracies, within_noise
from laco_train.study.ratio_tables import layer_collapse, listed
from laco_train.study.ratios import ORIGINAL, OverRatios, Quantity
from laco_train.study.tables import Table, count, percent


def accuracy_findings(over: OverRatios, means: MeanAccuracies) -> list[str]:
    """Who keeps most of the original's accuracy where, and where Layer Collapse stands."""
    lines = []
    for q in means.quantities:
        each = {ratio: means.ranked(over, ratio, q.key) for ratio in over.ratios}
        ranks = {ratio: ranked for ratio, ranked in each.items() if len(ranked) > 1}
        told = [_highest(means, ratio, ranked) for ratio, ranked in ranks.items()]
        if told:
            lines.append(f"The highest {means.label} {q.title}: {'; '.join(told)}.")
        shares = {ratio: [(name, _share(means, one)) for name, one in ranked] for ratio, ranked in ranks.items()}
        lines += [f"Layer Collapse by {means.label} {q.title}: {places}." for places in layer_collapse(shares)]
    return lines


def _highest(means: MeanAccuracies, ratio: float, ranked: list[tuple[str, Moment]]) -> str:
    alike = within_noise(ranked)
    others = "all others" if len(alike) == len(ranked) > 2 else listed(alike[1:]) if len(alike) > 1 else ""
    noise = f", within noise of {others}" if others else ""
    return f"{alike[0]} at {100 * ratio:g}% ({_share(means, ranked[0][1])}{noise})"


def _share(means: MeanAccuracies, one: Moment) -> str:
    """The share kept, or where the original was not measured the accuracy; and whether it is that of guesses."""
    share = means.kept(one)
    told = f"{one.estimate.value:.3f}" if share is None else f"{percent(share)} kept"
    return told + (", no better than chance" if is_chance(one.estimate, one.chance) else "")


def accuracy_notes(means: MeanAccuracies) -> list[str]:
    """A sentence on what was measured and is in no mean."""
    if not means.left_out:
        return []
    each = ", ".join(name if ratio == 0 else f"{name} at {100 * ratio:g}%" for name, ratio in means.left_out)
    return [f"Not in the mean accuracies over ratios, as other tasks or questions were measured: {each}."]


def mean_accuracy_tables(over: OverRatios, means: MeanAccuracies) -> list[Table]:
    """For each moment the mean accuracies, an arm a row; none where nothing was measured."""
    return [_table(over, means, q) for q in means.quantities]


def _table(over: OverRatios, means: MeanAccuracies, q: Quantity) -> Table:
    best = {}
    for ratio in over.ratios:
        ranked = means.ranked(over, ratio, q.key)
        if len(ranked) > 1 and len(within_noise(ranked)) == 1:
            best[ratio] = ranked[0][0]
    rows = []
    original = means.at(q.key, ORIGINAL, 0.0)
    if original is not None:
        rows.append((ORIGINAL, _cell(means, original), *[""] * len(over.ratios)))
    for line in over.lines:
        each = [(ratio, means.at(q.key, line.name, ratio)) for ratio in over.ratios]
        cells = [_cell(means, one) + ("*" if best.get(ratio) == line.name else "") for ratio, one in each]
        rows.append((line.name, "", *cells))
    after = f" on {count(over.tokens)} tokens" if q.key == "after" else ""
    header = ("arm", "0%", *(f"{100 * ratio:g}%" for ratio in over.ratios))
    return Table(f"{means.title} {q.title}{after}", _about(means, q), header, tuple(rows))


def _about(means: MeanAccuracies, q: Quantity) -> str:
    chance = means.chance(q.key)
    lines = [f"Share of questions answered right ± its standard error; tasks: {', '.join(means.tasks)}."]
    if means.baseline is not None:
        when = "before training" if means.at("before", ORIGINAL, 0.0) is not None else "after training"
        lines.append(f"In brackets: the share kept of the original's {when}, {means.baseline.value:.3f}.")
    if chance is None:
        lines.append("Chance is not told, as answers are free text.")
    else:
        lines.append(f"{CHANCE}: no better than chance, {chance:.3f}, by {CONFIDENCE} standard errors.")
    ahead = f"ahead of all others by more than {CONFIDENCE} standard errors of their difference"
    return " ".join([*lines, f"*: the highest at its ratio, {ahead}."])


def _cell(means: MeanAccuracies, one: Moment | None) -> str:
    share = None if one is None else means.kept(one)
    return accuracy_cell(one) + ("" if share is None else f" ({percent(share)})")
