"""What every way to choose layers takes and gives."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from laco_train.collapse.plan import Candidate, Merge
from laco_train.collapse.search import OnCandidate
from laco_train.collapse.walk import Walk
from laco_train.settings import CollapseSettings


@dataclass(frozen=True)
class Fitted:
    """A layer that was trained to stand for a block.

    Attributes:
        layer: its index in the collapsed model.
        weights: all of its parameters, by name, in the model's dtype.
        tokens: tokens that fitting read, each as often as it was read.
        seconds: time that fitting took.
    """

    layer: int
    weights: Mapping[str, Tensor]
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Choice:
    """What a strategy decided.

    Attributes:
        merge_rule: of `merges`; ``drop`` where layers are only removed.
        merges: in order.
        removed: original indices removed without a merge.
        candidates: what was tried.
        threshold: similarity threshold that it came from, or None.
        fitted: the layer that its one merge makes, for merge rule ``fitted``.
    """

    merge_rule: str
    merges: tuple[Merge, ...] = ()
    removed: tuple[int, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    threshold: float | None = None
    fitted: Fitted | None = None


# Leaves the walk standing at what it chose. The target is the number of layers that may remain at most.
Strategy = Callable[[Walk, CollapseSettings, int | None, OnCandidate | None], Choice]


class Tried(list[Candidate]):
    """Candidates in order, each reported as it is noted.

    Args:
        on_candidate: called with each; None reports nothing.
    """

    def __init__(self, on_candidate: OnCandidate | None):
        super().__init__()
        self._on_candidate = on_candidate

    def note(self, candidate: Candidate) -> None:
        """Append and report."""
        self.append(candidate)
        if self._on_candidate is not None:
            self._on_candidate(candidate)
