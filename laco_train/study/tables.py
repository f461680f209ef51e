"""Numbers of a comparison as rows of text, which the page and the Markdown show alike."""

from collections.abc import Sequence
from dataclasses import dataclass

from laco_train.study.curves import Arm
from laco_train.study.measures import SHARES, ArmLoss, ArmMeasures, Reached, Spread
from laco_train.study.speed import Speed, Speeds

NONE = "-"


@dataclass(frozen=True)
class Table:
    """A table: its title, what must be known to read it, header, rows, and the indices of those that are best.

    `prose` is for cells of whole sentences, which wrap.
    """

    title: str
    about: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    best: tuple[int, ...] = ()
    prose: bool = False


def count(value: float) -> str:
    """A number of tokens or parameters as people say it: 980, 32.8k, 10.2M, 1.7B."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.0f}"


def percent(share: float) -> str:
    """A share: one decimal below 10 %, none above."""
    value = 100 * share
    text = f"{value:.1f}%" if abs(value) < 9.95 else f"{value:.0f}%"
    return "0.0%" if text == "-0.0%" else text


def loss_table(measures: Sequence[ArmMeasures], budget: int, best: tuple[int, ...]) -> Table:
    """Losses at shares of the budget."""
    marked = any(loss is not None and loss.interpolated for m in measures for loss in m.losses)
    about = "Validation loss in nats per token" + _over_seeds(measures)
    about += "; ≈ lies between two evaluations, linear in the logarithm of tokens." if marked else "."
    if any(loss is None for m in measures for loss in m.losses):
        about += f" {NONE}: no evaluation near enough."
    for m in measures:
        if (refined := m.arm.runs[0].points[0].tokens) > 0:
            about += f" {m.arm.name} starts after {count(refined)} tokens of refinement, which its budget counts in."
    header = ("arm", "layers", *(_share_name(share, budget) for share in SHARES))
    rows = tuple((m.arm.name, _depths(m.arm), *map(_loss, m.losses)) for m in measures)
    return Table("Loss at shares of the budget", about, header, rows, best)


def _share_name(share: float, budget: int) -> str:
    return "start" if share == 0 else f"{percent(share).replace('.0%', '%')} ({count(share * budget)})"


def measure_table(measures: Sequence[ArmMeasures], budget: int, best: tuple[int, ...]) -> Table:
    """What was recovered and inherited."""
    about = (
        f"After {count(budget)} tokens{_over_seeds(measures)}. Recovered: share of the loss added by the collapse that "
        "training gave back, (L_0 - L_n) / (L_0 - L_original before training). Inherited: (L_scratch - L_arm) / "
        "(L_scratch - L_original), all three after the same tokens; 0% is no better than random weights, 100% the "
        "original trained on."
    )
    header = ("arm", "tokens to the original's starting loss", "recovered", "inherited")
    rows = tuple(
        (m.arm.name, _reached(m.reached), _spread_percent(m.recovered), _spread_percent(m.inheritance))
        for m in measures
    )
    return Table("What was recovered, what was inherited", about, header, rows, best)


def size_table(arms: Sequence[Arm], speeds: Speeds | None, best: tuple[int, ...]) -> Table:
    """Parameters, depth and training of every arm, and inference where it was measured."""
    header = ["arm", "layers", "parameters", "removed", "learning rate", "training tokens/s"]
    about = "Speed of training is that of each run, at its own time."
    if speeds is not None:
        header += ["prefill tokens/s", "decode tokens/s", "memory (GiB)"]
        about += f" Inference: {speeds.device}, {speeds.method}."
    rows = []
    for arm in arms:
        run = arm.runs[0]
        removed = NONE if run.source_parameters is None else percent(1 - run.parameters / run.source_parameters)
        rate = NONE if run.learning_rate is None else f"{run.learning_rate:g}"
        training = NONE if run.training_speed is None else _whole(run.training_speed)
        row = [arm.name, _depths(arm), count(run.parameters), removed, rate, training]
        if speeds is not None:
            speed = None if run.export is None else speeds.models.get(run.export)
            known = isinstance(speed, Speed)
            row += [_whole(speed.prefill), _rate(speed.decode), f"{speed.gib:.3g}"] if known else [NONE] * 3  # type: ignore[union-attr]
        rows.append(tuple(row))
    return Table("Size and speed", about, tuple(header), tuple(rows), best)


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _rate(value: float) -> str:
    return f"{value:.1f}" if value < 100 else _whole(value)


def _depths(arm: Arm) -> str:
    return ", ".join(map(str, arm.depths))


def _over_seeds(measures: Sequence[ArmMeasures]) -> str:
    return ", mean ± standard deviation over seeds" if any(len(m.arm.runs) > 1 for m in measures) else ""


def _loss(loss: ArmLoss | None) -> str:
    if loss is None:
        return NONE
    spread = "" if loss.spread.deviation is None else f" ± {loss.spread.deviation:.3f}"
    return f"{'≈' if loss.interpolated else ''}{loss.spread.mean:.3f}{spread}"


def _spread_percent(value: Spread | None) -> str:
    if value is None:
        return NONE
    return percent(value.mean) + ("" if value.deviation is None else f" ± {percent(value.deviation)}")


def _reached(seeds: Sequence[Reached | None]) -> str:
    found = [reached for reached in seeds if reached is not None]
    if not seeds:
        return NONE
    if not found:
        return "not reached"
    mean = count(sum(reached.tokens for reached in found) / len(found))
    kinds = {reached.how for reached in found}
    sign = "≤ " if "at most" in kinds else "≈" if "interpolated" in kinds else ""
    of = "" if len(found) == len(seeds) else f" ({len(found)} of {len(seeds)} seeds)"
    return f"{sign}{mean}{of}"
