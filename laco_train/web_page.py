"""Parts of a page that needs no other file: figures inside, light and dark, for a desk, a phone or paper."""

import base64
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from html import escape

_STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1f2328; --soft: #59636e; --line: #d0d7de; --mark: #ddf4ff; }
@media (prefers-color-scheme: dark) {
  :root { --back: #0d1117; --text: #e6edf3; --soft: #9198a1; --line: #30363d; --mark: #10294a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1100px; padding: 1.5rem 1rem 3rem; background: var(--back); color: var(--text);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.25rem 0 .5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
p { margin: .5rem 0; max-width: 46rem; } .soft, figcaption, th { color: var(--soft); }
figure { margin: 1rem 0 0; break-inside: avoid; } figcaption { font-size: .875rem; overflow-wrap: anywhere; }
img { display: block; width: 100%; height: auto; } .medium { max-width: 720px; } .small { max-width: 560px; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); gap: .5rem 1.5rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .75rem 0; }
th, td { padding: .1rem .75rem .1rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line);
  font-weight: normal; font-size: .9rem; }
.pick td { background: var(--mark); } .call { border-left: 4px solid #3b82c4; padding-left: .9rem; }
code { font-size: .875rem; white-space: nowrap; }
.side { display: flex; flex-wrap: wrap; gap: 0 2rem; align-items: flex-start; }
.side .medium { flex: 1 1 380px; } .side .scroll { max-width: 100%; }
@media (max-width: 480px) { th, td { font-size: .78rem; padding-right: .45rem; } }
@media print { body { max-width: none; padding: 0; font-size: 11pt; } .scroll { overflow: visible; }
  h2 { break-after: avoid; } }
"""


@dataclass(frozen=True)
class Drawn:
    """A picture as PNG, for a light and for a dark page, and what it shows in words."""

    alt: str
    light: bytes
    dark: bytes


def document(title: str, sections: Sequence[str], style: str = "") -> str:
    """The whole file.

    Args:
        title: in plain text.
        sections: HTML, in order.
        style: CSS beside what all pages share.
    """
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}{style}</style>\n</head>\n<body>\n{''.join(sections)}\n</body>\n</html>\n"
    )


def figure(drawn: Drawn, size: str, caption: str = "") -> str:
    """A picture, in light or dark as the reader's page is; `size` is ``small``, ``medium`` or empty."""
    light, dark = (f"data:image/png;base64,{base64.b64encode(png).decode()}" for png in (drawn.light, drawn.dark))
    above = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return (
        f'<figure class="{size}">{above}<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{escape(drawn.alt)}" src="{light}"></picture></figure>'
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]], picked: Collection[int] = ()) -> str:
    """A table that scrolls sideways where it is too wide; the rows `picked` are marked."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = ""
    for index, row in enumerate(rows):
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        body += f'<tr class="pick">{cells}</tr>' if index in picked else f"<tr>{cells}</tr>"
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
