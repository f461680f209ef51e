"""One HTML file that needs no other: figures inside, light and dark, for a desk, a phone or paper."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from laco_train.analysis.figures import picture_name
from laco_train.analysis.parameters import WHOLE_LAYER
from laco_train.analysis.result import Analysis, Sweep, perplexity
from laco_train.analysis.sweep import Outcome, best_at_each_depth

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

_ABOUT_STATES = """
<h2>Hidden states</h2>
<p>Cosine between a token&rsquo;s hidden states at two places of the residual stream, averaged over the calibration
tokens. A bright block along the diagonal is a run of layers that hardly turn the states: what enters it also leaves it,
so that one layer can stand for several.</p>
"""
_ABOUT_LAYERS = """
<h2>Each layer alone</h2>
<p>Block influence is 1 minus the cosine of the states that enter and leave a layer (ShortGPT, eq. 1). Below it, how
much the calibration loss rises when that layer alone is removed; the axis is linear up to 0.1 nats, logarithmic beyond,
and a green bar is a loss that falls. Where the two disagree, believe the loss: a small turn can matter much.</p>
"""
_ABOUT_PARAMETERS = """
<h2>Parameters</h2>
<p>Every pair of layers, module by module: the cosine of their parameters, and their distance over the mean of their
lengths. Bright is alike; each map has a scale of its own, and the diagonal is left out. A cosine near 0 with a distance
near 1.41 is what unrelated matrices have: such layers may do alike to the states without being alike.</p>
"""
# completed with the number of nats allowed
_ABOUT_SWEEP = """
<p>The rule: of the settings whose calibration loss rises by at most {allowed:.2f} nats per token
(<code>sweep.max_loss_increase</code>), the one that leaves the fewest layers; if each costs more, the one that costs
least for each layer that goes. At equal depth the least loss counts. The loss is that of a short calibration text
before any training, so confirm the choice with a run.</p>
"""


@dataclass(frozen=True)
class Drawn:
    """A picture as PNG, for a light and for a dark page, and what it shows in words."""

    alt: str
    light: bytes
    dark: bytes


def render_page(analysis: Analysis, shown: Mapping[str, Drawn]) -> str:
    """The page.

    Args:
        analysis: what it tells.
        shown: its pictures, by name.
    """
    title = f"Layers of {analysis.source}"
    sections = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{analysis.depth} layers, {analysis.parameters:,} parameters, {analysis.dtype}. Calibration: '
        f"{analysis.samples} samples, {analysis.tokens:,} tokens, loss {analysis.original_loss:.3f} nats per token "
        f"(perplexity {_perplexity(analysis.original_loss)}). Layers count from 0; L and H from 1.</p>",
        _in_short(analysis),
        _ABOUT_STATES + _figure(shown["hidden_states"], "small"),
        _layers_section(analysis, shown),
        _sweep_section(analysis, analysis.sweep, shown) if analysis.sweep is not None else "",
        _parameters_section(analysis, shown),
    ]
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{''.join(sections)}\n</body>\n</html>\n"
    )


def headline(analysis: Analysis) -> list[str]:
    """The findings in sentences, for the page and for a terminal."""
    ranked = sorted(range(analysis.depth), key=lambda layer: analysis.increases[layer])
    near = analysis.states.diagonal(1).mean().item()
    whole = analysis.modules[0].cosine.diagonal(1).nanmean().item()
    lines = [
        f"Neighbouring layers: hidden states have cosine {near:.2f} on average, parameters {whole:.2f}.",
        f"Least missed: {_named(ranked[:3], analysis)}.",
        f"Most missed: {_named(ranked[:-4:-1], analysis)}.",
    ]
    if analysis.sweep is not None:
        lines.append(f"Recommended: {analysis.sweep.recommendation.reason}")
    return lines


def _named(layers: Sequence[int], analysis: Analysis) -> str:
    return ", ".join(f"layer {layer} ({analysis.increases[layer]:+.2f} nats)" for layer in layers)


def _in_short(analysis: Analysis) -> str:
    return '<div class="call">' + "".join(f"<p>{escape(line)}</p>" for line in headline(analysis)) + "</div>"


def _layers_section(analysis: Analysis, shown: Mapping[str, Drawn]) -> str:
    rows = [
        (str(layer), f"{influence:.4f}", f"{loss:.3f}", f"{increase:+.3f}", _perplexity(loss))
        for layer, (influence, loss, increase) in enumerate(
            zip(analysis.block_influence, analysis.losses_without, analysis.increases, strict=True)
        )
    ]
    header = ("layer", "influence", "loss without", "change", "perplexity")
    return f'{_ABOUT_LAYERS}<div class="side">{_figure(shown["layers"], "medium")}{_table(header, rows)}</div>'


def _sweep_section(analysis: Analysis, sweep: Sweep, shown: Mapping[str, Drawn]) -> str:
    best = best_at_each_depth(sweep.outcomes)
    chosen = sweep.recommendation.outcome
    header = ("layers", "C", "L", "H", "I", "T", "similarity", "loss", "change", "perplexity")
    rows = [_outcome_row(outcome, analysis) for outcome in best]
    picked = best.index(chosen) if chosen is not None else None
    options = " ".join(f"<code>{escape(option)}</code>" for option in sweep.recommendation.options)
    command = f"<p>To use it, add to the recipe&rsquo;s command: {options}</p>" if options else ""
    return (
        f"<h2>Sweep over {len(sweep.outcomes)} settings</h2>"
        f"<p><strong>{escape(sweep.recommendation.reason)}</strong></p>{command}"
        + _ABOUT_SWEEP.format(allowed=sweep.allowed)
        + _figure(shown["sweep"], "medium")
        + "<p>The least loss at each depth; sweep.csv has every setting.</p>"
        + _table(header, rows, picked)
    )


def _outcome_row(outcome: Outcome, analysis: Analysis) -> tuple[str, ...]:
    o = outcome
    letters = (o.depth, o.layers_per_merge, o.lowest_layer, o.highest_layer, o.min_interval, o.similarity_threshold)
    change = f"{o.loss - analysis.original_loss:+.3f}"
    return (*map(str, letters), f"{o.similarity:.4f}", f"{o.loss:.3f}", change, _perplexity(o.loss))


def _parameters_section(analysis: Analysis, shown: Mapping[str, Drawn]) -> str:
    figures = "".join(_figure(shown[picture_name(module)], "", module.name) for module in analysis.modules)
    return (
        f'{_ABOUT_PARAMETERS}<div class="grid">{figures}</div><p class="soft">&ldquo;{WHOLE_LAYER}&rdquo; joins all '
        "parameters of a layer to one vector. parameters.csv has every number.</p>"
    )


def _figure(drawn: Drawn, size: str, caption: str = "") -> str:
    light, dark = (f"data:image/png;base64,{base64.b64encode(png).decode()}" for png in (drawn.light, drawn.dark))
    above = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return (
        f'<figure class="{size}">{above}<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img alt="{escape(drawn.alt)}" src="{light}"></picture></figure>'
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], picked: int | None = None) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = ""
    for index, row in enumerate(rows):
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        body += f'<tr class="pick">{cells}</tr>' if index == picked else f"<tr>{cells}</tr>"
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _perplexity(loss: float) -> str:
    return f"{perplexity(loss):,.1f}" if loss < 20 else f"e^{loss:.0f}"
