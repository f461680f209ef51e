"""Pictures of a report, to files and to its page."""

from collections.abc import Callable, Sequence
from pathlib import Path

from laco_train.analysis.figures import Picture
from laco_train.web_page import Drawn


def draw(
    pictures: Sequence[Picture], output: Path, on_picture: Callable[[int, int], None] | None = None
) -> dict[str, Drawn]:
    """Draw `pictures`, the light ones to ``<name>.png`` in the folder `output` too.

    Args:
        pictures: what to draw.
        output: folder that exists.
        on_picture: called after each picture with how many are drawn, of how many.
    """
    shown: dict[str, Drawn] = {}
    for picture in pictures:
        drawn = Drawn(picture.alt, picture.png(dark=False), picture.png(dark=True))
        (output / f"{picture.name}.png").write_bytes(drawn.light)
        shown[picture.name] = drawn
        if on_picture is not None:
            on_picture(len(shown), len(pictures))
    return shown
