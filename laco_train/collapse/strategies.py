"""Ways to choose layers. A new one is one function from (walk, settings, target) and one line in STRATEGIES."""

from laco_train.collapse.choice import Choice, OnCandidate, Strategy
from laco_train.collapse.greedy import greedy, sleb
from laco_train.collapse.plan import Merge
from laco_train.collapse.rivals import angular, shortgpt, streamline, tail
from laco_train.collapse.search import laco
from laco_train.collapse.walk import Walk
from laco_train.settings import CollapseSettings


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


# collapse.strategy: none has no entry, as it chooses nothing
STRATEGIES: dict[str, Strategy] = {
    "laco": layer_collapse,
    "greedy": greedy,
    "shortgpt": shortgpt,
    "angular": angular,
    "sleb": sleb,
    "tail": tail,
    "streamline": streamline,
}
