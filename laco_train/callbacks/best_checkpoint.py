"""The best checkpoint of a run beside the one that it goes on from."""

import re
from pathlib import Path

from lightning.pytorch import Trainer

from laco_train.callbacks.curves import Curves
from laco_train.callbacks.newest_checkpoint import NewestCheckpoint

_STEP = re.compile(r"step=(\d+)")


class BestAndNewestCheckpoint(NewestCheckpoint):
    """Keeps the newest checkpoint and, of all, the one with the lowest validation loss.

    Losses come from the run's curve, which a resumed run goes on with, so that nothing else has to be remembered.
    """

    def _should_remove_checkpoint(self, trainer: Trainer, previous: str, current: str) -> bool:
        return False  # the previous one may be the best; see outdated

    def outdated(self, trainer: Trainer, newest: Path) -> list[Path]:
        """All but the newest and the best."""
        (curves,) = (callback for callback in trainer.callbacks if isinstance(callback, Curves))  # type: ignore[attr-defined]
        losses = {point[0]: point[2] for point in curves.validation}
        paths = [newest, *super().outdated(trainer, newest)]
        best = min(paths, key=lambda path: losses.get(_step(path), float("inf")))
        return [path for path in paths if path not in (newest, best)]


def _step(path: Path) -> int:
    found = _STEP.search(path.name)
    return int(found[1]) if found else -1
