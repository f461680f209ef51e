"""Attention and MLP removed apart, where what is left is still a standard model (issue 8, Search).

    python benchmarks/sublayers.py --train train.jsonl.gz --validation validation.jsonl.gz --output sublayers

A layer is two halves, attention and then MLP. Two neighbours can go and leave halves that alternate, in their order:
those of one layer, or the MLP of one and the attention of the next, whose other halves then make up one layer. Cuts
are named by their halves, counted from 0: a2-m9 is layers 2 to 9, m2-a10 as many halves, one further on.

Measured with whole layers alone and with halves: the best of all single cuts, and a greedy choice (the pair that harms
least, again and again; with whole layers that is SLEB, arXiv 2402.09025), both by the loss on text that neither
calibration nor validation holds. Then each on validation text, before the closed form and after it. Llama-like only.
"""

import argparse
import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import run_or_say, write_results
from merge_rules import refuse_unlike_llama
from merges import SOURCE, solve_together
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from windows import loss_of, texts

from laco_train.collapse import decoder_of
from laco_train.collapse.decoder import collapsible, keep_layers
from laco_train.errors import InputError
from laco_train.models import load_model, load_tokenizer
from laco_train.refine.windows import Window, recorded
from laco_train.training.loss import Batch, model_inputs, target_tokens

Kept = tuple[int, ...]
"""Halves of the original, ascending, attention (2 times the layer) and MLP (that plus 1) in turn."""
ATTENTION, MLP = 0, 1
MLP_PARTS = ("post_attention_layernorm", "mlp")


def pairs(kept: Kept, whole: bool) -> list[int]:
    """Where in `kept` two neighbours may go; `whole`: only those of one layer."""
    return [at for at in range(len(kept) - 1) if not whole or kept[at] % 2 == ATTENTION]


def without(kept: Kept, at: int, count: int = 2) -> Kept:
    """`kept` but for `count` neighbours from place `at` on."""
    return kept[:at] + kept[at + count :]


def cuts(depth: int, removed: int, whole: bool) -> list[Kept]:
    """What each single cut leaves of all halves."""
    every = tuple(range(2 * depth))
    return [without(every, at, 2 * removed) for at in range(0, 2 * (depth - removed) + 1, 2 if whole else 1)]


def named(kept: Kept, depth: int) -> str:
    """The halves that are not kept, as cuts: a2-m9,m12-a13."""
    edges = [-1, *kept, 2 * depth]
    return ",".join(f"{_half(a + 1)}-{_half(b - 1)}" for a, b in pairwise(edges) if b > a + 1)


def _half(at: int) -> str:
    return f"{'am'[at % 2]}{at // 2}"


def composed(original: PreTrainedModel, kept: Kept) -> PreTrainedModel:
    """A copy of `original` whose layers have the attention of one and the MLP of the same or a later one."""
    model = copy.deepcopy(original)
    stack = decoder_of(original).stack
    decoder = keep_layers(decoder_of(model), [at // 2 for at in kept[::2]])
    for layer, at in zip(decoder.stack, kept[1::2], strict=True):
        for name in MLP_PARTS:
            setattr(layer, name, copy.deepcopy(getattr(stack[at // 2], name)))
    return model


def windows_of(kept: Kept, depth: int) -> list[Window]:
    """Layers that stand for several: from where their attention was to where the next one's was."""
    firsts = [at // 2 for at in kept[::2]]
    every = [Window(at, a, b - 1) for at, (a, b) in enumerate(pairwise([*firsts, depth]))]
    return [window for window in every if window.last > window.first]


@dataclass(frozen=True)
class Halves:
    """A model's halves, run one by one on some batches.

    Attributes:
        calls: how the model calls each layer, batch by batch.
        entering: (B, T, D) states that enter the first layer, likewise.
    """

    model: PreTrainedModel
    batches: Sequence[Batch]
    calls: list[dict[int, dict[str, Any]]]
    entering: list[Tensor]

    @classmethod
    @torch.no_grad()
    def of(cls, model: PreTrainedModel, batches: Sequence[Batch]) -> "Halves":
        """Those of `model` on `batches`, from one pass."""
        calls, entering = [], []
        for batch in batches:
            with recorded(model, [Window(at, at, at) for at in range(decoder_of(model).depth)]) as (seen, _):
                model.base_model(**model_inputs(model, batch))
            calls.append({at: kwargs for at, (_, kwargs) in seen.items()})
            entering.append(seen[0][0][0])
        return cls(model, batches, calls, entering)

    @torch.no_grad()
    def through(self, halves: Sequence[int], states: list[Tensor]) -> list[Tensor]:
        """States that leave the last of `halves`, for those that enter the first."""
        stack: Any = decoder_of(self.model).stack
        for at in halves:
            layer = stack[at // 2]
            if at % 2 == MLP:
                states = [h + layer.mlp(layer.post_attention_layernorm(h)) for h in states]
            else:
                given = zip(states, self.calls, strict=True)
                states = [h + layer.self_attn(layer.input_layernorm(h), **calls[at // 2])[0] for h, calls in given]
        return states

    @torch.no_grad()
    def loss(self, states: list[Tensor]) -> float:
        """Nats per token, from states that leave the last half."""
        norm: Any = decoder_of(self.model).norm
        total, tokens = 0.0, 0
        for h, batch in zip(states, self.batches, strict=True):
            logits = self.model.get_output_embeddings()(norm(h))  # (B, T, V)
            wanted = batch["labels"][:, 1:]
            total += float(cross_entropy(logits[:, :-1].float().flatten(0, 1), wanted.flatten(), reduction="sum"))
            tokens += int(target_tokens(batch))
        return total / tokens

    def losses(self, kept: Kept, choices: Sequence[Kept]) -> list[float]:
        """Of each of `choices`, which are `kept` with a cut; what comes before the cut is computed once."""
        starts = [next((n for n, (a, b) in enumerate(zip(kept, c, strict=False)) if a != b), len(c)) for c in choices]
        assert starts == sorted(starts)
        states, done, found = self.entering, 0, []
        for start, choice in zip(starts, choices, strict=True):
            states, done = self.through(kept[done:start], states), start
            found.append(self.loss(self.through(choice[start:], states)))
        return found


Looked = list[tuple[str, float]]
"""Names of cuts that a choice looked at, and the loss of each."""


def best_cut(halves: Halves, depth: int, removed: int, whole: bool) -> tuple[Kept, Looked]:
    """What the single cut of least loss leaves, and all cuts."""
    choices = cuts(depth, removed, whole)
    losses = halves.losses(tuple(range(2 * depth)), choices)
    return choices[losses.index(min(losses))], [
        (named(c, depth), loss) for c, loss in zip(choices, losses, strict=True)
    ]


def greedy(halves: Halves, depth: int, removed: int, whole: bool) -> tuple[Kept, Looked]:
    """What is left when the pair whose loss without it is least has gone, `removed` times, and what each time left."""
    kept: Kept = tuple(range(2 * depth))
    looked = []
    for _ in range(removed):
        choices = [without(kept, at) for at in pairs(kept, whole)]
        losses = halves.losses(kept, choices)
        kept = choices[losses.index(min(losses))]
        looked.append((named(kept, depth), min(losses)))
        print(*looked[-1], flush=True)
    return kept, looked


def measured(
    original: PreTrainedModel, kept: Kept, calibration: list[Batch], validation: list[Batch], folder: Path | None
) -> tuple[float, float]:
    """Loss of what is composed of `kept`, which is written to `folder`, and of the same after the closed form."""
    model = composed(original, kept)
    if folder:
        model.save_pretrained(folder)
    before = loss_of(model, validation)
    windows, stack = windows_of(kept, decoder_of(original).depth), decoder_of(model).stack
    solve_together(original, [[stack[window.layer] for window in windows]], windows, calibration)
    return before, loss_of(model, validation)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=SOURCE, help="whatever model.source takes")
    parser.add_argument("--train", required=True, help="text to calibrate on and to choose by, as data.train takes it")
    parser.add_argument("--validation", required=True, help="text to measure on, as data.validation takes it")
    parser.add_argument("--removed", type=int, default=8, help="layers' worth of halves that go")
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--choice-tokens", type=int, default=2048)
    parser.add_argument("--validation-tokens", type=int, default=8192)
    parser.add_argument("--block", type=int, default=256, help="tokens in a block")
    parser.add_argument("--save", type=Path, help="folder to write each model into, before the closed form")
    parser.add_argument("--output", help="name of the results file; none: print only")
    return parser


def run(options: argparse.Namespace) -> None:
    """Each choice, and what it is worth."""
    original = load_model(options.model, dtype=torch.float32).eval()
    depth = collapsible(original).depth
    if not 0 < options.removed < depth:
        raise InputError("--removed", f"{options.removed} of {depth} layers can't go")
    refuse_unlike_llama(original, [range(depth)])
    tokenizer = load_tokenizer(options.model)
    calibration, chosen_on, validation = texts(options, tokenizer)
    halves = Halves.of(original, chosen_on)
    base, rows = loss_of(original, validation), []
    for way, choose in (("single cut", best_cut), ("greedy", greedy)):
        for whole in (True, False):
            began = time.perf_counter()
            kept, looked = choose(halves, depth, options.removed, whole)
            seconds = time.perf_counter() - began
            row = {"choice": way, "of": "whole layers" if whole else "halves", "removed": named(kept, depth)}
            folder = options.save / "-".join((way, str(row["of"]))).replace(" ", "_") if options.save else None
            before, after = measured(original, kept, calibration, validation, folder)
            if folder:
                tokenizer.save_pretrained(folder)
            row |= {
                "looked_at": looked,
                "loss": before,
                "loss_solved": after,
                "original_loss": base,
                "seconds": seconds,
            }
            print(row, flush=True)
            rows.append(row)
    if options.output:
        write_results(options.output, rows)


def main() -> None:
    """Run, or say in one line why not."""
    run_or_say(arguments(), run)


if __name__ == "__main__":
    main()
