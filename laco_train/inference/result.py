"""Figures of several models over their turns, beside those of the first. Pure."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from laco_train.inference.measure import Measured, Turn, Workload

MEASURES: dict[str, Callable[[Turn], float]] = {
    "first_token_seconds": lambda turn: turn.first,
    "prefill_tokens_per_second": lambda turn: turn.prefill,
    "decode_tokens_per_second": lambda turn: turn.decode,
    "gib": lambda turn: turn.gib,
}
"""What is told of each model at each batch size."""


@dataclass(frozen=True)
class Figure:
    """Median, lowest and highest over the turns, and the median of the ratios turn by turn to the first model.

    The ratio of two medians would compare different minutes.
    """

    median: float
    low: float
    high: float
    ratio: float | None


@dataclass(frozen=True)
class Bench:
    """What one call of `bench-inference` found.

    Attributes:
        sources: of each model by name, as the user named it; the first is what ratios are to.
        models: what was measured of each.
        work: what they did.
        device: in words.
        memory: what the memory is, in words.
        versions: of Python and the libraries.
    """

    sources: Mapping[str, str]
    models: Mapping[str, Measured]
    work: Workload
    device: str
    memory: str
    versions: Mapping[str, str]

    def figures(self, name: str, batch: int) -> dict[str, Figure] | str:
        """Figures of model `name` at `batch` sequences by the names of MEASURES, or why there are none."""
        index = self.work.batches.index(batch)
        turns, first = self.models[name].turns[index], next(iter(self.models.values())).turns[index]
        if isinstance(turns, str):
            return turns
        return {key: _figure(turns, first, value) for key, value in MEASURES.items()}


def _figure(turns: Sequence[Turn], first: Sequence[Turn] | str, value: Callable[[Turn], float]) -> Figure:
    found = [value(turn) for turn in turns]
    ratio = None
    if not isinstance(first, str):
        ratio = statistics.median(value(mine) / value(other) for mine, other in zip(turns, first, strict=True))
    return Figure(statistics.median(found), min(found), max(found), ratio)
