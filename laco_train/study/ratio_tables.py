"""What a study over ratios found, in sentences and as tables."""

import csv
import io
from collections.abc import Mapping, Sequence

from laco_train.study.measures import Spread
from laco_train.study.ratio_accuracy import MeanAccuracies, accuracy_columns, accuracy_values
from laco_train.study.ratio_figures import number
from laco_train.study.ratios import ORIGINAL, QUANTITIES, Level, OverRatios, Quantity, perplexity
from laco_train.study.tables import NONE, Table, count, percent

_LACO = "laco"


def ratio_findings(found: OverRatios) -> list[str]:
    """Who is lowest where, where Layer Collapse stands, and whose loss rises least and most."""
    lines = []
    for q in found.quantities:
        ranks = {ratio: found.ranked(ratio, q.key) for ratio in found.ratios}
        ranks = {ratio: ranked for ratio, ranked in ranks.items() if len(ranked) > 1}
        if ranks:
            lines += [_lowest(q, ranks), *_layer_collapse(q, ranks)]
        lines += _stability(found, q)
    return lines


def _lowest(q: Quantity, ranks: dict[float, list[tuple[str, float]]]) -> str:
    firsts: dict[str, list[str]] = {}
    for ratio, ranked in ranks.items():
        firsts.setdefault(ranked[0][0], []).append(f"{100 * ratio:g}%")
    each = "; ".join(f"{name} at {listed(where)}" for name, where in firsts.items())
    return f"The lowest loss {q.title}: {each}."


def _layer_collapse(q: Quantity, ranks: dict[float, list[tuple[str, float]]]) -> list[str]:
    behind = {
        ratio: [(name, f"{loss - ranked[0][1]:+.3f}") for name, loss in ranked] for ratio, ranked in ranks.items()
    }
    return [f"Layer Collapse {q.title} (above the lowest): {places}." for places in layer_collapse(behind)]


def layer_collapse(ranks: Mapping[float, Sequence[tuple[str, str]]]) -> list[str]:
    """Where Layer Collapse stands: "place 1 of 3 at 10% (+0.000) and 2 of 3 at 50% (+2.000)"; none if nowhere.

    Args:
        ranks: by ratio, the best arm first, each with what is told of it.
    """
    told = []
    for ratio, ranked in ranks.items():
        names = [name for name, _ in ranked]
        if _LACO in names:
            place = names.index(_LACO)
            told.append(f"{place + 1} of {len(names)} at {100 * ratio:g}% ({ranked[place][1]})")
    return [f"place {listed(told)}"] if told else []


def _stability(found: OverRatios, q: Quantity) -> list[str]:
    """How much the loss of each arm rises from the smallest to the largest ratio."""
    first, last = found.ratios[0], found.ratios[-1]
    starts, ends = (dict(found.ranked(ratio, q.key)) for ratio in (first, last))
    rises = {name: ends[name] - starts[name] for name in ends if name in starts and first != last}
    if len(rises) < 2:
        return []
    each = ", ".join(f"{name} {rises[name]:+.3f}" for name in sorted(rises, key=lambda name: rises[name]))
    return [f"From {100 * first:g}% to {100 * last:g}% of the parameters removed, the loss {q.title} changes: {each}."]


def listed(parts: Sequence[str]) -> str:
    """ "a, b and c"; one part or more."""
    return ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]


def ratio_tables(found: OverRatios) -> list[Table]:
    """For each quantity losses and perplexities, an arm a row; then what the ratios are."""
    return [*(_table(found, q) for q in found.quantities), _size_table(found)]


def _table(found: OverRatios, q: Quantity) -> Table:
    lowest = {ratio: ranked[0][0] for ratio in found.ratios if len(ranked := found.ranked(ratio, q.key)) > 1}
    rows = []
    original = None if found.original is None else found.original.values[q.key]
    if original is not None:
        rows.append((ORIGINAL, _value(original), *[""] * len(found.ratios)))
    for line in found.lines:
        cells = [
            _value(line.at(ratio, q.key)) + ("*" if lowest.get(ratio) == line.name else "") for ratio in found.ratios
        ]
        rows.append((line.name, "", *cells))
    after = f" on {count(found.tokens)} tokens" if q.key == "after" else ""
    seeds = ", mean ± standard deviation over seeds" if _has_seeds(found) else ""
    about = (
        f"Validation loss in nats per token{seeds}, and in brackets the perplexity, over the share of all "
        "parameters that was to be removed. *: the lowest at its ratio."
    )
    header = ("arm", "0%", *(f"{100 * ratio:g}%" for ratio in found.ratios))
    return Table(f"Loss and perplexity {q.title}{after}", about, header, tuple(rows))


def _has_seeds(found: OverRatios) -> bool:
    values = [value for line in found.lines for level in line.levels for value in level.values.values()]
    return any(value is not None and value.count > 1 for value in values)


def _value(value: Spread | None) -> str:
    if value is None:
        return NONE
    deviation = "" if value.deviation is None else f" ± {value.deviation:.3f}"
    return f"{value.mean:.3f}{deviation} ({number(perplexity(value.mean))})"


def _size_table(found: OverRatios) -> Table:
    levels = {(level.ratio, -level.depth): level for line in found.lines for level in line.levels}
    rows = tuple(
        (f"{100 * level.ratio:g}%", percent(level.removed), str(level.depth), count(level.parameters))
        for _, level in sorted(levels.items())
    )
    about = "Whole layers are removed, so the share that is gone is the nearest to what was asked for."
    return Table("What the ratios are", about, ("asked for", "removed", "layers left", "parameters left"), rows)


def ratios_csv(found: OverRatios, means: MeanAccuracies) -> str:
    """A row for each arm and ratio; the original's ratio is 0. Without columns of accuracies where none is known."""
    stream = io.StringIO()
    rows = csv.writer(stream, lineterminator="\n")
    columns = [f"{name}_{q.key}" for q in QUANTITIES for name in ("loss", "deviation", "perplexity")]
    rows.writerow(["arm", "ratio", "removed", "layers", "parameters", "seeds", *columns, *accuracy_columns(means)])
    for name, level in levels_of(found):
        seeds = max((value.count for value in level.values.values() if value is not None), default=0)
        cells = [cell for q in QUANTITIES for cell in _cells(level.values[q.key])]
        cells += accuracy_values(means, name, level.ratio)
        rows.writerow([name, level.ratio, level.removed, level.depth, level.parameters, seeds, *cells])
    return stream.getvalue()


def _cells(value: Spread | None) -> tuple[float | None, float | None, float | None]:
    return (None, None, None) if value is None else (value.mean, value.deviation, perplexity(value.mean))


def levels_of(found: OverRatios) -> list[tuple[str, Level]]:
    """(arm, level) of all, the original first."""
    first = [] if found.original is None else [(ORIGINAL, found.original)]
    return first + [(line.name, level) for line in found.lines for level in line.levels]
