"""What runs differ in and should not, if their losses are to be compared; a sentence each."""

from collections.abc import Sequence

from laco_train.study.curves import Run

_DISAGREE = 0.01
"""Nats by which runs may differ on the original's loss before training, for rounding, on the same text."""


def unlike(runs: Sequence[Run]) -> list[str]:
    """All of it."""
    return [*data_warnings(runs), *depth_warning(runs)]


def data_warnings(runs: Sequence[Run]) -> list[str]:
    """On unlike data, to validate on and to train on."""
    validated = validation_warning(runs)
    trained = {run.train_sha256 for run in runs if run.train_sha256 is not None and run.points[-1].tokens}
    return [
        *([] if validated is None else [validated]),
        *(["The runs did not train on the same blocks."] if len(trained) > 1 else []),
    ]


def validation_warning(runs: Sequence[Run]) -> str | None:
    """One line if `runs` were validated on unlike data, by sha256, or where that is unknown by the original's loss."""
    curved = [run for run in runs if run.points]
    known = sorted({run.validation_sha256 for run in curved if run.validation_sha256 is not None})
    if len(known) > 1:
        groups = (", ".join(_place(run) for run in curved if run.validation_sha256 == sha) for sha in known)
        return f"The runs were validated on unlike data, so their losses do not compare: {' | '.join(groups)}."
    certain = all(run.validation_sha256 is not None for run in curved)
    losses = [run.original for run in curved if run.original is not None]
    if not certain and losses and max(losses) - min(losses) > _DISAGREE:
        return (
            f"The original's loss before training differs between runs ({min(losses):.3f} to {max(losses):.3f}): "
            "another model or other validation data, so their losses do not compare."
        )
    return None


def _place(run: Run) -> str:
    return "/".join(run.folder.resolve().parts[-2:])


def depth_warning(runs: Sequence[Run]) -> list[str]:
    """One line for each ratio, or for runs without one, at which collapsed arms have unlike depths."""
    found: dict[float | None, dict[str, set[int]]] = {}
    for run in runs:
        if run.is_collapsed:
            found.setdefault(run.ratio, {}).setdefault(run.line, set()).add(run.depth)
    lines = []
    for ratio, arms in found.items():
        if len({tuple(sorted(depths)) for depths in arms.values()}) > 1:
            where = "" if ratio is None else f" at {100 * ratio:g}%"
            each = ", ".join(f"{name} {'/'.join(map(str, sorted(depths)))}" for name, depths in arms.items())
            lines.append(
                f"The collapsed arms differ in depth{where}, so a lower loss may be that of more layers: {each}."
            )
    return lines
