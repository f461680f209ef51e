"""Writes an analysis as a folder: page, pictures, tables, JSON, and an event file for TensorBoard."""

import io
from collections.abc import Callable
from pathlib import Path

from matplotlib.image import imread
from torch.utils.tensorboard import SummaryWriter

from laco_train.analysis.figures import draw, pictures
from laco_train.analysis.page import headline, render_page
from laco_train.analysis.result import Analysis, tables, to_json
from laco_train.web_page import Drawn


def write_analysis(analysis: Analysis, output: Path, on_picture: Callable[[int, int], None] | None = None) -> Path:
    """Write `output`, the page last, and return the path of the page.

    Args:
        analysis: what to write.
        output: folder; made if it is not there.
        on_picture: called after each picture with how many are drawn, of how many.
    """
    output.mkdir(parents=True, exist_ok=True)
    shown = draw(pictures(analysis), output, on_picture)
    for name, text in tables(analysis).items():
        (output / name).write_text(text, encoding="utf-8")
    (output / "analysis.json").write_text(to_json(analysis), encoding="utf-8")
    _write_events(analysis, shown, output)
    page = output / "report.html"
    page.write_text(render_page(analysis, shown), encoding="utf-8")
    return page


def _write_events(analysis: Analysis, shown: dict[str, Drawn], output: Path) -> None:
    with SummaryWriter(str(output)) as writer:
        for name, drawn in shown.items():
            pixels = imread(io.BytesIO(drawn.light))  # height, width, RGBA
            writer.add_image(f"analysis/{name}", pixels[..., :3], dataformats="HWC")
        writer.add_text("analysis/findings", "\n".join(f"- {line}" for line in headline(analysis)))
        for layer, (influence, loss) in enumerate(zip(analysis.block_influence, analysis.losses_without, strict=True)):
            writer.add_scalar("layers/block_influence", influence, layer)
            writer.add_scalar("layers/loss_without", loss, layer)
