"""Which windows of layers to collapse into their first one, chosen with refinement in view (issue 8, Search).

    python benchmarks/windows.py --train train.jsonl.gz --validation validation.jsonl.gz --output windows

Each window of layers, counted from 0, becomes its first layer, solved in closed form to do what the window did. First
alone: what each window costs, in nats per token on text that neither calibration nor validation holds, beside the
original. Then windows apart from each other whose costs add up to the least (dynamic programming, exact), those of a
greedy choice (the neighbours whose joining costs least, again and again), and `--beside`, each set collapsed at once
and measured on validation text, before the closed form and after it. All windows share the passes of the original.
"""

import argparse
import copy
import math
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from common import run_or_say, write_results
from merges import BATCH, PLACE, POOL, SOURCE, parsed, solve_together
from torch import nn
from transformers import PreTrainedModel

from laco_train.collapse import decoder_of
from laco_train.collapse.decoder import Decoder, collapsible, keep_layers
from laco_train.errors import InputError
from laco_train.models import load_model, load_tokenizer
from laco_train.refine.windows import Window
from laco_train.settings import DataSettings
from laco_train.training.data import PackedText
from laco_train.training.loss import Batch, mean_loss

Span = tuple[int, int]
"""First and last layer of a window, counted from 0."""
Costs = dict[Span, float]
ANGULAR, SLEB = "1-9", "8-9,12-18,24-25"


def cheapest(costs: Costs, depth: int, removed: int) -> list[Span]:
    """Windows apart from each other that leave `depth - removed` layers and whose costs add up to the least.

    Args:
        costs: of windows of two layers or more.

    Raises:
        InputError: no such windows have costs.
    """
    # best[r]: cost and windows of the layers so far, r of them removed
    by_last: dict[int, list[tuple[int, float]]] = {}
    for (first, last), cost in costs.items():
        by_last.setdefault(last, []).append((first, cost))
    nothing: tuple[float, tuple[Span, ...]] = (0.0, ())
    before: list[dict[int, tuple[float, tuple[Span, ...]]]] = [{0: nothing}]
    for last in range(depth):
        best = dict(before[last])
        for first, cost in by_last.get(last, []):
            for gone, (total, windows) in before[first].items():
                now = gone + last - first
                if now <= removed and (now not in best or total + cost < best[now][0]):
                    best[now] = (total + cost, (*windows, (first, last)))
        before.append(best)
    if removed not in before[depth]:
        raise InputError("--removed", f"no windows that were measured remove {removed} of {depth} layers")
    return list(before[depth][removed][1])


def greedy(costs: Costs, depth: int, removed: int) -> list[Span]:
    """Windows from joining neighbours, each time those whose joining adds least to the sum of costs.

    Raises:
        InputError: all that is left to join has no cost.
    """
    groups: list[Span] = [(at, at) for at in range(depth)]

    def cost(group: Span) -> float:
        return 0.0 if group[0] == group[1] else costs.get(group, math.inf)

    for _ in range(removed):
        joined = [(a[0], b[1]) for a, b in pairwise(groups)]
        added = [cost((a[0], b[1])) - cost(a) - cost(b) for a, b in pairwise(groups)]
        at = min(range(len(added)), key=added.__getitem__)
        if math.isinf(added[at]):
            raise InputError("--removed", f"no windows that were measured remove {removed} of {depth} layers")
        groups[at : at + 2] = [joined[at]]
    return [group for group in groups if group[0] < group[1]]


def collapsed(original: PreTrainedModel, spans: Sequence[Span]) -> tuple[PreTrainedModel, Decoder, list[Window]]:
    """A copy of `original` in which each window is its first layer, as it is."""
    model = copy.deepcopy(original)
    gone = {at for first, last in spans for at in range(first + 1, last + 1)}
    decoder = keep_layers(decoder_of(model), [at for at in range(decoder_of(original).depth) if at not in gone])
    return model, decoder, [Window(first - sum(at < first for at in gone), first, last) for first, last in spans]


def loss_of(model: PreTrainedModel, batches: list[Batch]) -> float:
    """Nats per token."""
    return mean_loss(model, batches, PLACE.device, PLACE.context).loss


@torch.no_grad()
def costs_of(
    original: PreTrainedModel, spans: Sequence[Span], calibration: list[Batch], chosen_on: list[Batch]
) -> Costs:
    """Nats that each window alone adds, once solved; all are solved in the same passes."""
    stack = decoder_of(original).stack
    clones: list[nn.Module] = [copy.deepcopy(stack[first]) for first, _ in spans]
    solve_together(original, [clones], [Window(0, *span) for span in spans], calibration)
    base, found = loss_of(original, chosen_on), {}
    for span, clone in zip(spans, clones, strict=True):
        model, decoder, (window,) = collapsed(original, [span])
        decoder.stack[window.layer] = clone
        found[span] = loss_of(model, chosen_on) - base
        print(span, round(found[span], 4), flush=True)
    return found


def measured(
    original: PreTrainedModel, spans: Sequence[Span], calibration: list[Batch], validation: list[Batch]
) -> tuple[float, float]:
    """Loss with all windows collapsed, before the closed form and after it."""
    model, decoder, windows = collapsed(original, spans)
    before = loss_of(model, validation)
    solve_together(original, [[decoder.stack[window.layer] for window in windows]], windows, calibration)
    return before, loss_of(model, validation)


def texts(options: argparse.Namespace, tokenizer: Any) -> tuple[list[Batch], list[Batch], list[Batch]]:
    """Batches to calibrate on, to choose by and to measure on."""
    wanted = options.calibration_tokens + options.choice_tokens
    settings = DataSettings(
        train=options.train,
        validation=options.validation,
        block_size=options.block,
        batch_size=BATCH,
        max_tokens=POOL * wanted,
        validation_max_tokens=options.validation_tokens,
    )
    data = PackedText(settings, lambda: tokenizer)
    data.setup("fit")
    leading = data.leading(wanted // options.block, BATCH)
    split = options.calibration_tokens // options.block // BATCH
    return leading[:split], leading[split:], list(data.all_validation())


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=SOURCE, help="whatever model.source takes")
    parser.add_argument("--train", required=True, help="text to calibrate on and to choose by, as data.train takes it")
    parser.add_argument("--validation", required=True, help="text to measure on, as data.validation takes it")
    parser.add_argument("--removed", type=int, default=8, help="layers that go")
    parser.add_argument("--longest", type=int, default=9, help="layers of a window, at most")
    parser.add_argument("--beside", nargs="*", default=[ANGULAR, SLEB], help="windows to measure too: 1-9 or 8-9,12-18")
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--choice-tokens", type=int, default=2048)
    parser.add_argument("--validation-tokens", type=int, default=8192)
    parser.add_argument("--block", type=int, default=256, help="tokens in a block")
    parser.add_argument("--output", help="name of the results file; none: print only")
    return parser


def run(options: argparse.Namespace) -> None:
    """The table of costs, then each choice."""
    original = load_model(options.model, dtype=torch.float32).eval()
    depth = collapsible(original).depth
    beside = {text: [(window[0], window[-1]) for window in parsed(text, depth)] for text in options.beside}
    calibration, chosen_on, validation = texts(options, load_tokenizer(options.model))
    spans = [(a, b) for a in range(depth) for b in range(a + 1, min(a + options.longest, depth))]
    began = time.perf_counter()
    costs = costs_of(original, spans, calibration, chosen_on)
    seconds = time.perf_counter() - began
    choices = {"cheapest": cheapest(costs, depth, options.removed), "greedy": greedy(costs, depth, options.removed)}
    base, rows = loss_of(original, validation), []
    for name, chosen in (choices | beside).items():
        before, after = measured(original, chosen, calibration, validation)
        added = sum(costs.get(span, math.nan) for span in chosen)
        text = ",".join(f"{first}-{last}" for first, last in chosen)
        row = {"choice": name, "windows": text, "costs_added": added, "loss": before, "loss_solved": after}
        print(row, flush=True)
        rows.append({**row, "original_loss": base})
    if options.output:
        table = [[first, last, cost] for (first, last), cost in costs.items()]
        rows.append({"choice": "each window alone", "costs": table, "seconds": seconds})
        write_results(options.output, rows)


def main() -> None:
    """Run, or say in one line why not."""
    run_or_say(arguments(), run)


if __name__ == "__main__":
    main()
