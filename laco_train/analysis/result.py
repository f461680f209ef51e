"""Everything that an analysis found, and the same as JSON and as CSV tables."""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from laco_train.analysis.parameters import ModulePairs
from laco_train.analysis.states import block_influence
from laco_train.analysis.sweep import Outcome, Recommendation


@dataclass(frozen=True)
class Sweep:
    """A sweep and what follows from it; `allowed` is the nats that the recommended setting may cost."""

    outcomes: tuple[Outcome, ...]
    recommendation: Recommendation
    allowed: float


@dataclass(frozen=True)
class Analysis:
    """What was found about one model; layers and places count from 0.

    Attributes:
        source: where the model came from.
        parameters: number of parameters of the model, tied ones once.
        dtype: type of its weights.
        samples: calibration samples.
        tokens: calibration tokens.
        modules: parameters of all pairs of layers, the whole layer first.
        states: (L + 1, L + 1) cosines of hidden states; place i is what enters layer i, place L what leaves the last.
        original_loss: calibration loss, nats per token.
        losses_without: the same without each single layer.
        sweep: None unless asked for.
    """

    source: str
    parameters: int
    dtype: str
    samples: int
    tokens: int
    modules: tuple[ModulePairs, ...]
    states: Tensor
    original_loss: float
    losses_without: tuple[float, ...]
    sweep: Sweep | None

    @property
    def depth(self) -> int:
        """L, the number of layers."""
        return len(self.losses_without)

    @property
    def block_influence(self) -> list[float]:
        """For each layer, see `laco_train.analysis.states.block_influence`."""
        influences: list[float] = block_influence(self.states).tolist()
        return influences

    @property
    def increases(self) -> list[float]:
        """Nats that the calibration loss rises without each single layer."""
        return [loss - self.original_loss for loss in self.losses_without]


def perplexity(loss: float) -> float:
    """exp of a loss in nats, infinite where that is past any float."""
    return math.exp(loss) if loss < 700 else math.inf


def to_json(analysis: Analysis) -> str:
    """All of it but the comparisons of parameters, which are in the CSV; NaN and infinity become null."""
    sweep = analysis.sweep
    values = {
        "source": analysis.source,
        "depth": analysis.depth,
        "parameters": analysis.parameters,
        "dtype": analysis.dtype,
        "calibration": {"samples": analysis.samples, "tokens": analysis.tokens, "loss": analysis.original_loss},
        "state_cosines": analysis.states.tolist(),
        "block_influence": analysis.block_influence,
        "losses_without": list(analysis.losses_without),
        "sweep": None if sweep is None else dataclasses.asdict(sweep),
    }
    return json.dumps(_finite(values), indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def tables(analysis: Analysis) -> dict[str, str]:
    """CSV files by name: parameters, hidden states, layers, and the sweep if there was one."""
    files = {
        "parameters.csv": _csv(
            ("module", "layer_a", "layer_b", "cosine", "relative_distance"),
            (
                (module.name, a, b, cosine, distance)
                for module in analysis.modules
                for a, (cosines, distances) in enumerate(
                    zip(module.cosine.tolist(), module.distance.tolist(), strict=True)
                )
                for b, (cosine, distance) in enumerate(zip(cosines, distances, strict=True))
            ),
        ),
        "hidden_states.csv": _csv(
            ("place_a", "place_b", "cosine"),
            ((a, b, cosine) for a, cosines in enumerate(analysis.states.tolist()) for b, cosine in enumerate(cosines)),
        ),
        "layers.csv": _csv(
            ("layer", "block_influence", "loss_without", "loss_increase", "perplexity_without"),
            (
                (layer, influence, loss, increase, perplexity(loss))
                for layer, (influence, loss, increase) in enumerate(
                    zip(analysis.block_influence, analysis.losses_without, analysis.increases, strict=True)
                )
            ),
        ),
    }
    if analysis.sweep is not None:
        names = [field.name for field in dataclasses.fields(Outcome)]
        rows = ((*dataclasses.astuple(o), perplexity(o.loss)) for o in analysis.sweep.outcomes)
        files["sweep.csv"] = _csv((*names, "perplexity"), rows)
    return files


def _csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()
