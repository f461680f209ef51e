"""One HTML file that needs no other: figures inside, light and dark, for a desk, a phone or paper."""

from collections.abc import Mapping, Sequence
from html import escape

from laco_train.analysis.figures import picture_name
from laco_train.analysis.parameters import WHOLE_LAYER
from laco_train.analysis.result import Analysis, Sweep, perplexity
from laco_train.analysis.sweep import Outcome, best_at_each_depth
from laco_train.web_page import Drawn, document, figure, table

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
        _ABOUT_STATES + figure(shown["hidden_states"], "small"),
        _layers_section(analysis, shown),
        _sweep_section(analysis, analysis.sweep, shown) if analysis.sweep is not None else "",
        _parameters_section(analysis, shown),
    ]
    return document(title, sections)


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
    return f'{_ABOUT_LAYERS}<div class="side">{figure(shown["layers"], "medium")}{table(header, rows)}</div>'


def _sweep_section(analysis: Analysis, sweep: Sweep, shown: Mapping[str, Drawn]) -> str:
    best = best_at_each_depth(sweep.outcomes)
    chosen = sweep.recommendation.outcome
    header = ("layers", "C", "L", "H", "I", "T", "similarity", "loss", "change", "perplexity")
    rows = [_outcome_row(outcome, analysis) for outcome in best]
    picked = [best.index(chosen)] if chosen is not None else []
    options = " ".join(f"<code>{escape(option)}</code>" for option in sweep.recommendation.options)
    command = f"<p>To use it, add to the recipe&rsquo;s command: {options}</p>" if options else ""
    return (
        f"<h2>Sweep over {len(sweep.outcomes)} settings</h2>"
        f"<p><strong>{escape(sweep.recommendation.reason)}</strong></p>{command}"
        + _ABOUT_SWEEP.format(allowed=sweep.allowed)
        + figure(shown["sweep"], "medium")
        + "<p>The least loss at each depth; sweep.csv has every setting.</p>"
        + table(header, rows, picked)
    )


def _outcome_row(outcome: Outcome, analysis: Analysis) -> tuple[str, ...]:
    o = outcome
    letters = (o.depth, o.layers_per_merge, o.lowest_layer, o.highest_layer, o.min_interval, o.similarity_threshold)
    change = f"{o.loss - analysis.original_loss:+.3f}"
    return (*map(str, letters), f"{o.similarity:.4f}", f"{o.loss:.3f}", change, _perplexity(o.loss))


def _parameters_section(analysis: Analysis, shown: Mapping[str, Drawn]) -> str:
    figures = "".join(figure(shown[picture_name(module)], "", module.name) for module in analysis.modules)
    return (
        f'{_ABOUT_PARAMETERS}<div class="grid">{figures}</div><p class="soft">&ldquo;{WHOLE_LAYER}&rdquo; joins all '
        "parameters of a layer to one vector. parameters.csv has every number.</p>"
    )


def _perplexity(loss: float) -> str:
    return f"{perplexity(loss):,.1f}" if loss < 20 else f"e^{loss:.0f}"
