"""Progress bars with an estimate of what is left, on stderr so that results on stdout stay clean."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from laco_train.collapse.plan import Candidate


def bar() -> Progress:
    """A bar: what, how much of how much, time gone, time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


@contextmanager
def search_progress(lowest_layer: int) -> Iterator[Callable[[Candidate], None]]:
    """A bar over the layers that a search still has to try; yields what `collapse_model` calls after each candidate.

    Args:
        lowest_layer: L, counted from 1, where the search ends.
    """
    with bar() as progress:
        task = progress.add_task("Searching for layers to collapse", total=None)
        first: list[int] = []

        def on_candidate(candidate: Candidate) -> None:
            first.append(candidate.layer)
            total = first[0] - (lowest_layer - 1) + 1
            progress.update(task, total=total, completed=first[0] - candidate.layer + 1)

        yield on_candidate
        progress.update(task, total=max(len(first), 1), completed=max(len(first), 1))
