"""A comparison as one HTML page and as Markdown: the same sentences, tables and figures in both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from laco_train.study.tables import Table
from laco_train.web_page import Drawn, document, figure, table

PAGE, MARKDOWN = "index.html", "report.md"
_STYLE = """
th, td { vertical-align: bottom; } thead th { white-space: normal; min-width: 4.2rem; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--back); }
.pick td { font-weight: 700; } .pick td:first-child { background: var(--mark); }
.prose th, .prose td { text-align: left; vertical-align: top; } .prose td { white-space: normal; min-width: 13rem; }
.prose td:first-child { min-width: 4.2rem; }
.warn { border-left: 4px solid #d9822b; padding-left: .9rem; }
@media (max-width: 480px) { thead th { min-width: 3.4rem; } }
@media print { th, td { font-size: 8pt; padding-right: .35rem; } thead th { min-width: 0; }
  table { break-inside: avoid; }
  .grid { grid-template-columns: 1fr 1fr; } th:first-child, td:first-child { position: static; } }
"""


@dataclass(frozen=True)
class Report:
    """What a page shows.

    Attributes:
        title: its heading.
        about: one line under it.
        findings: what was found, a sentence each.
        notes: what a reader must know before comparing, a sentence each.
        tables: in order; they follow the figures.
        heading: of the figures.
        shown: figures by name, in order.
        captions: of figures, by name.
        files: what lies beside the page, as HTML.
    """

    title: str
    about: str
    findings: Sequence[str]
    notes: Sequence[str]
    tables: Sequence[Table]
    heading: str
    shown: Mapping[str, Drawn]
    captions: Mapping[str, str]
    files: str


def write_pages(report: Report, output: Path) -> Path:
    """Write Markdown and then the page to the folder `output`; returns the path of the page."""
    (output / MARKDOWN).write_text(render_markdown(report), encoding="utf-8")
    page = output / PAGE
    page.write_text(render_page(report), encoding="utf-8")
    return page


def render_page(report: Report) -> str:
    """The page."""
    figures = "".join(figure(drawn, "", report.captions[name]) for name, drawn in report.shown.items())
    sections = [
        f'<h1>{escape(report.title)}</h1><p class="soft">{escape(report.about)}</p>',
        _paragraphs("call", report.findings),
        _paragraphs("warn", report.notes),
        f'<h2>{escape(report.heading)}</h2><div class="grid">{figures}</div>' if figures else "",
        *(_section(one) for one in report.tables),
        f'<p class="soft">{report.files}</p>',
    ]
    return document(report.title, sections, _STYLE)


def _section(one: Table) -> str:
    cells = table(one.header, one.rows, one.best)
    about = f"<p>{escape(one.about)}</p>" if one.about else ""
    return f"<h2>{escape(one.title)}</h2>{about}" + (f'<div class="prose">{cells}</div>' if one.prose else cells)


def _paragraphs(kind: str, lines: Sequence[str]) -> str:
    return f'<div class="{kind}">{"".join(f"<p>{escape(line)}</p>" for line in lines)}</div>' if lines else ""


def render_markdown(report: Report) -> str:
    """The same as `render_page`, with pictures as files beside it."""
    parts = [f"# {report.title}", "", report.about, "", *(f"- {line}" for line in report.findings)]
    parts += ["", *(f"> {line}  " for line in report.notes)] if report.notes else []
    for name, drawn in report.shown.items():
        parts += ["", f"![{drawn.alt}]({name}.png)", "", report.captions[name]]
    for one in report.tables:
        parts += ["", f"## {one.title}", *(["", one.about] if one.about else []), "", *markdown_table(one)]
    return "\n".join([*parts, ""])


def markdown_table(one: Table) -> list[str]:
    """Lines of a table as GitHub renders it; the best rows are bold."""
    aligned = "---" if one.prose else "---:"
    lines = [_row(one.header), "|" + "|".join(["---", *[aligned] * (len(one.header) - 1)]) + "|"]
    for index, row in enumerate(one.rows):
        lines.append(_row([f"**{cell}**" for cell in row] if index in one.best else row))
    return lines


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
