"""What a comparison says in sentences: who is ahead, and what a reader must know before believing it."""

from collections.abc import Mapping, Sequence
from typing import Any

from laco_train.study.curves import Arm
from laco_train.study.measures import ArmMeasures
from laco_train.study.speed import Speeds
from laco_train.study.tables import count
from laco_train.study.tasks import run_name
from laco_train.study.unlike import depth_warning

_LACO = "laco"


def findings(measures: Sequence[ArmMeasures], budget: int, original: float | None, reference: str) -> list[str]:
    """Which collapsed arm ends best and by how much, where Layer Collapse stands, and what frames both.

    Args:
        measures: the lowest final loss first.
        budget: tokens that all have trained on.
        original: loss of the original before training; None if unknown.
        reference: name of the arm that is the original trained on.
    """
    lines = []
    groups = by_depth(rivals_of(measures, reference))
    for those in groups:
        where = f"At {those[0].arm.depths[0]} layers, " if len(groups) > 1 else ""
        lines += [f"{where}{line}" for line in (_best(those, budget), *_layer_collapse(those))]
    frame = {m.arm.name: m for m in measures}
    if reference in frame and frame[reference].losses[-1] is not None:
        before = "" if original is None else f" It began at {original:.3f}."
        lines.append(
            f"The original with all its layers, trained on alike, ends at {frame[reference].final:.3f}.{before}"
        )
    for m in measures:
        if m.arm.runs[0].from_scratch and m.losses[-1] is not None:
            alike = [one for one in rivals_of(measures, reference) if one.arm.depths == m.arm.depths]
            worse = [one.arm.name for one in alike if one.final >= m.final]
            but = f", no worse than {', '.join(worse)}" if worse else ""
            lines.append(f"Random weights in a shape of {m.arm.depths[0]} layers end at {m.final:.3f}{but}.")
    return lines


def rivals_of(measures: Sequence[ArmMeasures], reference: str) -> list[ArmMeasures]:
    """Those of collapsed models that have a loss at the budget."""
    return [m for m in measures if m.arm.is_rival and m.arm.name != reference and m.losses[-1] is not None]


def by_depth(measures: Sequence[ArmMeasures]) -> list[list[ArmMeasures]]:
    """`measures` apart by depth, the deepest first, in the order given within each."""
    groups: dict[tuple[int, ...], list[ArmMeasures]] = {}
    for m in measures:
        groups.setdefault(tuple(m.arm.depths), []).append(m)
    return [groups[depths] for depths in sorted(groups, reverse=True)]


def _best(rivals: Sequence[ArmMeasures], budget: int) -> str:
    first = rivals[0]
    if len(rivals) == 1:
        return f"{first.arm.name} ends at {first.final:.3f} nats per token after {count(budget)} tokens."
    second = rivals[1]
    line = (
        f"{first.arm.name} ends best of the {len(rivals)} collapsed arms: {first.final:.3f} nats per token after "
        f"{count(budget)} tokens, {second.final - first.final:.3f} below {second.arm.name}."
    )
    noise = [d for m in (first, second) if (end := m.losses[-1]) and (d := end.spread.deviation) is not None]
    if noise and second.final - first.final < max(noise):
        line += " That is within the spread over seeds."
    return line


def _layer_collapse(rivals: Sequence[ArmMeasures]) -> list[str]:
    lines = []
    for m in rivals:
        if m.arm.runs[0].strategy != _LACO or m is rivals[0]:
            continue
        behind, place = m.final - rivals[0].final, rivals.index(m) + 1
        start = _start_against(m, rivals)
        name = "Layer Collapse" if m.arm.name == _LACO else f"Layer Collapse ({m.arm.name})"
        lines.append(
            f"{name} loses: it ends at {m.final:.3f}, {behind:.3f} above {rivals[0].arm.name}, "
            f"place {place} of {len(rivals)}{start}."
        )
    return lines


def _start_against(m: ArmMeasures, rivals: Sequence[ArmMeasures]) -> str:
    starts = {one.arm.name: loss.spread.mean for one in rivals if (loss := one.losses[0]) is not None}
    own = starts.get(m.arm.name)
    if own is None:
        return ""
    best = min(starts, key=lambda name: starts[name])
    if best == m.arm.name:
        return f"; before training it was the best, at {own:.3f}"
    return f"; before training it stood at {own:.3f}, {best} at {starts[best]:.3f}"


def study_notes(record: Mapping[str, Any], begun: Sequence[str], finished: Sequence[str]) -> list[str]:
    """What a study's own record adds: runs that are not in the report, and how learning rates were chosen.

    Args:
        record: study.json; empty if there is none.
        begun: names of the runs that have a folder, such as laco-seed0.
        finished: those at their end.
    """
    lines = []
    left = {name: "" for name in begun}
    for entry in record.get("runs", []):
        problem = f" (failed: {entry['problem']})" if entry.get("problem") else ""
        left[run_name(entry["arm"], entry["seed"], entry.get("ratio"))] = problem
    if out := [f"{name}{problem}" for name, problem in left.items() if name not in finished]:
        lines.append(f"Not finished, so left out: {', '.join(out)}.")
    swept = []
    for arm, rate in record.get("learning_rates", {}).items():
        if rate.get("how") == "sweep":
            tried = ", ".join(f"{one['learning_rate']:g}" for one in rate["tried"])
            swept.append(f"{arm} {rate['chosen']:g} of {tried}")
    if swept:
        lines.append(f"Learning rates chosen on documents that are not reported here: {'; '.join(swept)}.")
    return lines


def notes(arms: Sequence[Arm], budget: int, reference: str, speeds: Speeds | None) -> list[str]:
    """What is unlike, missing or averaged over, a sentence each."""
    curved = [arm for arm in arms if arm.budget]
    lines = [*_unlike(curved, budget, reference), *_missing(curved, reference)]
    if without := [arm.name for arm in arms if not arm.budget]:
        lines.append(f"No curve, as they are exports or were not trained: {', '.join(without)}.")
    for folder, speed in speeds.models.items() if speeds is not None else ():
        if isinstance(speed, str):
            lines.append(f"Inference of {folder} was not measured: {speed}")
    return lines


def _unlike(curved: Sequence[Arm], budget: int, reference: str) -> list[str]:
    lines = []
    for arm in curved:
        if len(arm.depths) > 1:
            lines.append(
                f"{arm.name} is averaged over seeds of unlike depth: {', '.join(map(str, arm.depths))} layers."
            )
    lines += depth_warning([run for arm in curved if arm.name != reference for run in arm.runs])
    if any(arm.budget > 1.02 * budget for arm in curved):
        lines.append(f"The runs have unlike lengths; shares are of the shortest, {count(budget)} tokens.")
    if any(len(run.segments) > 1 for arm in curved for run in arm.runs):
        lines.append(
            "Some arms were collapsed in rounds: recovered counts from the last collapse, tokens over all rounds."
        )
    sources = {run.source_parameters for arm in curved for run in arm.runs if run.source_parameters is not None}
    if len(sources) > 1:
        lines.append(f"The runs began with models of unlike size: {', '.join(map(count, sorted(sources)))} parameters.")
    return lines


def _missing(curved: Sequence[Arm], reference: str) -> list[str]:
    lines = []
    if curved and reference not in [arm.name for arm in curved]:
        lines.append(f"No inheritance is told, as no run is named {reference}: the original, trained on alike.")
    shapes = [arm.depths for arm in curved if arm.runs[0].from_scratch]
    if alone := [arm.name for arm in curved if arm.is_rival and arm.name != reference and arm.depths not in shapes]:
        lines.append(f"No inheritance is told of {', '.join(alone)}: no run has random weights in the same shape.")
    timeless = [arm.name for arm in curved if any(run.points[-1].seconds is None for run in arm.runs)]
    if timeless:
        lines.append(f"Not in the figure over time, as their runs did not keep it: {', '.join(timeless)}.")
    unknown = [arm.name for arm in curved if any(run.validation_sha256 is None for run in arm.runs)]
    if unknown and len(curved) > 1:
        lines.append(f"Not known to be validated on the same data as the rest: {', '.join(unknown)}.")
    return lines
