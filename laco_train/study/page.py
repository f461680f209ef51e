"""A comparison as one HTML page and as Markdown: the same sentences, tables and figures in both."""

from collections.abc import Mapping, Sequence
from html import escape

from laco_train.study.tables import Table
from laco_train.web_page import Drawn, document, figure, table

_STYLE = """
th, td { vertical-align: bottom; } thead th { white-space: normal; min-width: 4.2rem; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--back); }
.pick td { font-weight: 700; } .pick td:first-child { background: var(--mark); }
.warn { border-left: 4px solid #d9822b; padding-left: .9rem; }
@media (max-width: 480px) { thead th { min-width: 3.4rem; } }
@media print { th, td { font-size: 8pt; padding-right: .35rem; } thead th { min-width: 0; }
  table { break-inside: avoid; }
  .grid { grid-template-columns: 1fr 1fr; } th:first-child, td:first-child { position: static; } }
"""
_CAPTIONS = {
    "curves": "Against tokens, on a logarithmic scale that begins with 0. Beside the names: the last losses.",
    "curves_linear": "Against tokens, only the lower part of the losses; ↑: ends above it.",
    "curves_time": "Against time in training, validation and compilation aside.",
    "curves_flops": "Against the operations that training took, counted from the shape of the model.",
}


def render_page(
    title: str,
    about: str,
    findings: Sequence[str],
    notes: Sequence[str],
    tables: Sequence[Table],
    shown: Mapping[str, Drawn],
) -> str:
    """The page.

    Args:
        title: its heading.
        about: one line under it.
        findings: what it found, a sentence each.
        notes: what a reader must know before comparing, a sentence each.
        tables: in order; the first stands before the figures.
        shown: pictures by name, in order.
    """
    figures = "".join(figure(drawn, "", _CAPTIONS[name]) for name, drawn in shown.items())
    first, *rest = [_section(one) for one in tables]
    sections = [
        f'<h1>{escape(title)}</h1><p class="soft">{escape(about)}</p>',
        _paragraphs("call", findings),
        _paragraphs("warn", notes),
        f'<h2>Curves</h2><div class="grid">{figures}</div>' if figures else "",
        first,
        *rest,
        '<p class="soft">curves.csv has every point, report.json every measure; '
        "<code>tensorboard --logdir tensorboard</code> in this folder overlays the curves.</p>",
    ]
    return document(title, sections, _STYLE)


def _section(one: Table) -> str:
    return f"<h2>{escape(one.title)}</h2><p>{escape(one.about)}</p>{table(one.header, one.rows, one.best)}"


def _paragraphs(kind: str, lines: Sequence[str]) -> str:
    return f'<div class="{kind}">{"".join(f"<p>{escape(line)}</p>" for line in lines)}</div>' if lines else ""


def render_markdown(
    title: str,
    about: str,
    findings: Sequence[str],
    notes: Sequence[str],
    tables: Sequence[Table],
    shown: Mapping[str, Drawn],
) -> str:
    """The same as `render_page`, with pictures as files beside it."""
    parts = [f"# {title}", about, *(f"- {line}" for line in findings)]
    parts += ["", *(f"> {line}  " for line in notes)] if notes else []
    for name, drawn in shown.items():
        parts += ["", f"![{drawn.alt}]({name}.png)", "", _CAPTIONS[name]]
    for one in tables:
        parts += ["", f"## {one.title}", "", one.about, "", *markdown_table(one)]
    return "\n".join([parts[0], "", parts[1], "", *parts[2:], ""])


def markdown_table(one: Table) -> list[str]:
    """Lines of a table as GitHub renders it; the best rows are bold."""
    lines = [_row(one.header), "|" + "|".join(["---", *["---:"] * (len(one.header) - 1)]) + "|"]
    for index, row in enumerate(one.rows):
        lines.append(_row([f"**{cell}**" for cell in row] if index in one.best else row))
    return lines


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
