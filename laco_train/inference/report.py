"""A bench as a table and as JSON."""

import dataclasses
from typing import Any

from laco_train.inference.result import Bench, Figure
from laco_train.study.tables import NONE, Table, count

_HEADER = ("batch", "model", "layers", "parameters", "weights", "first token, ms", "prefill tokens/s", "x")
_MORE = ("decode tokens/s", "x", "memory, GiB", "x")


def table(bench: Bench) -> Table:
    """A row a model at each batch size, those of one batch size together."""
    work, first = bench.work, next(iter(bench.models))
    about = (
        f"{bench.device}. Prompts of {work.prompt:,} random tokens, {work.new:,} generated greedily after the first, "
        f"plain Transformers. Medians of {work.turns} turns, in brackets the lowest and the highest; {bench.memory}; "
        f"x: to {first}."
    )
    rows = [_row(bench, name, batch) for batch in work.batches for name in bench.models]
    return Table("Inference", about, (*_HEADER, *_MORE), tuple(rows))


def _row(bench: Bench, name: str, batch: int) -> tuple[str, ...]:
    model, figures = bench.models[name], bench.figures(name, batch)
    start = (str(batch), name, str(model.layers), count(model.parameters), model.dtype)
    if isinstance(figures, str):
        return (*start, figures, *[NONE] * 6)
    first, prefill, decode, gib = figures.values()
    milliseconds = Figure(1e3 * first.median, 1e3 * first.low, 1e3 * first.high, first.ratio)
    speeds = (_spread(prefill), _ratio(prefill), _spread(decode), _ratio(decode))
    return (*start, _spread(milliseconds), *speeds, f"{gib.high:.3g}", _ratio(gib))


def _spread(figure: Figure) -> str:
    return f"{_number(figure.median)} ({_number(figure.low)} to {_number(figure.high)})"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(figure: Figure) -> str:
    return NONE if figure.ratio is None else f"{figure.ratio:.2f}"


def as_json(bench: Bench) -> dict[str, Any]:
    """Every figure, in plain types."""
    return {
        "device": bench.device,
        "versions": dict(bench.versions),
        "workload": dataclasses.asdict(bench.work),
        "memory": bench.memory,
        "models": [
            {
                "name": name,
                "source": bench.sources[name],
                "layers": model.layers,
                "parameters": model.parameters,
                "dtype": model.dtype,
                "batches": [_batch(bench, name, batch) for batch in bench.work.batches],
            }
            for name, model in bench.models.items()
        ],
    }


def _batch(bench: Bench, name: str, batch: int) -> dict[str, Any]:
    figures = bench.figures(name, batch)
    if isinstance(figures, str):
        return {"batch": batch, "problem": figures}
    return {"batch": batch, **{key: dataclasses.asdict(figure) for key, figure in figures.items()}}
