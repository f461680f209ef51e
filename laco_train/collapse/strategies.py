"""Ways to choose layers. A new one is one function from (walk, settings, target) and one line in STRATEGIES."""

from collections.abc import Callable
from dataclasses import dataclass

from laco_train.collapse.plan import Candidate, Merge
from laco_train.collapse.search import OnCandidate, laco
from laco_train.collapse.walk import Walk
from laco_train.settings import CollapseSettings


@dataclass(frozen=True)
class Choice:
    """What a strategy decided.

    Attributes:
        merge_rule: of `merges`; ``drop`` where layers are only removed.
        merges: in order.
        removed: original indices removed without a merge.
        candidates: what was tried.
        threshold: similarity threshold that it came from, or None.
    """

    merge_rule: str
    merges: tuple[Merge, ...] = ()
    removed: tuple[int, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    threshold: float | None = None


Strategy = Callable[[Walk, CollapseSettings, int | None, OnCandidate | None], Choice]


def layer_collapse(
    walk: Walk, settings: CollapseSettings, target: int | None, on_candidate: OnCandidate | None
) -> Choice:
    """The paper's Algorithm 1, see `laco_train.collapse.search`."""
    found = laco(walk, settings, target, on_candidate)
    accepted = [(c, c.similarity) for c in found.candidates if c.accepted and c.similarity is not None]
    return Choice(
        merge_rule=settings.merge_rule,
        merges=tuple(Merge(c.layer, c.absorbed, similarity) for c, similarity in accepted),
        candidates=tuple(found.candidates),
        threshold=found.threshold,
    )


STRATEGIES: dict[str, Strategy] = {"laco": layer_collapse}
