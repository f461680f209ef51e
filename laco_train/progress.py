"""Progress bars with an estimate of what is left, on stderr so that results on stdout stay clean."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from laco_train.collapse.plan import Candidate
from laco_train.settings import CollapseSettings


def bar(*, disable: bool = False) -> Progress:
    """A bar: what, how much of how much, time gone, time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=disable,
    )


@contextmanager
def search_progress(settings: CollapseSettings) -> Iterator[Callable[[Candidate], None]]:
    """A bar over what a search still has to try; yields what `collapse_model` calls after each candidate.

    Algorithm 1 at one threshold ends at a known layer; how much other searches try is not known before.
    """
    known = settings.strategy == "laco" and settings.target_depth is None and settings.target_ratio is None
    with bar() as progress:
        task = progress.add_task("Searching for layers to collapse", total=None)
        tried: list[int] = []

        def on_candidate(candidate: Candidate) -> None:
            tried.append(candidate.layer)
            if known:
                total = tried[0] - (settings.lowest_layer - 1) + 1
                progress.update(task, total=total, completed=tried[0] - candidate.layer + 1)
            else:
                progress.update(task, completed=len(tried))

        yield on_candidate
        done = max(len(tried), 1)
        progress.update(task, total=done, completed=done)
