"""What a search speaks of: layers of the standing model, windows of them on trial, and what a trial would do.

Shapes: S samples, T padded tokens, D hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from laco_train.collapse.similarity import LayerCall


@dataclass(frozen=True)
class Slot:
    """A layer of the model as it stands in the search: an original layer, with merged weights in place of some.

    Attributes:
        origin: index of the original layer that runs it.
        layer: its module.
        own: the parameters of its module, by name.
        merged: parameters that an accepted merge replaced.
        history: what went into it: an original index, or the histories of the slots that merged.
    """

    origin: int
    layer: nn.Module
    own: Mapping[str, Tensor]
    merged: Mapping[str, Tensor]
    history: object

    def run(self, hidden: Tensor, call: LayerCall, overrides: Mapping[str, Tensor]) -> Any:
        """Map (S, T, D) hidden states through the layer, `overrides` in place of its module's own weights."""
        if not overrides:
            return self.layer(hidden, *call.args, **call.kwargs)
        return functional_call(self.layer, dict(overrides), (hidden, *call.args), call.kwargs)

    def weights(self) -> dict[str, Tensor]:
        """Its parameters by name, merged ones included."""
        return {**self.own, **self.merged}


@dataclass(frozen=True)
class Trial:
    """A window of the standing model that would become its first layer.

    Attributes:
        at: index of the window's first slot.
        absorbed: number of slots after it that would go.
    """

    at: int
    absorbed: int

    @property
    def end(self) -> int:
        """Index of the first slot after the window."""
        return self.at + self.absorbed + 1


@dataclass(frozen=True)
class Removal:
    """A window of the standing model of which nothing would remain.

    Attributes:
        at: index of its first slot.
        end: index of the first slot after it.
    """

    at: int
    end: int


@dataclass(frozen=True)
class Measured:
    """What a trial would do: cosine of final states with the original's, and nats per calibration token if asked."""

    similarity: float
    loss: float | None
