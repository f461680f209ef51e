"""How the time of a search grows with depth and with calibration tokens: small random Llamas on a CPU.

    python benchmarks/search_scaling.py --output search_scaling

A search that accepts nothing at C, L = 1, H = depth tries depth - C candidates; each runs its merged layer and the
layers after its window. With the original's own pass (and its last layer once more) these are
depth + 1 + (depth - C)(depth - C + 3) / 2 layer runs: quadratic in depth. Each is linear in tokens for samples of one
length. Times are CPU seconds of one thread, so that other work on the machine does not count; runs take turns.

By default glibc gives large activations back to the system after each layer, and the page faults of getting them again
grow faster than the tokens. So tokens are measured twice: as malloc is, and with freed memory kept.
"""

import argparse
import ctypes
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from common import write_results
from transformers import LlamaConfig, LlamaForCausalLM

from laco_train.collapse.decoder import decoder_of
from laco_train.collapse.search import laco
from laco_train.collapse.similarity import CalibrationBatch
from laco_train.collapse.walk import Walk
from laco_train.settings import CollapseSettings

DEPTHS = (8, 16, 32)
TOKENS = (256, 512, 1024, 2048)
SAMPLE = 32  # tokens in a sample
SETTINGS = CollapseSettings(layers_per_merge=4, similarity_threshold=1.0)


@dataclass
class Case:
    """A search to time; `samples` are of SAMPLE tokens."""

    name: str
    depth: int
    samples: int
    seconds: list[float] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Calibration tokens."""
        return self.samples * SAMPLE

    @property
    def layer_runs(self) -> int:
        """Layer runs by the formula above."""
        candidates = self.depth - SETTINGS.layers_per_merge
        return self.depth + 1 + candidates * (candidates + 3) // 2


def small_llama(depth: int) -> LlamaForCausalLM:
    """Random float32 weights; a layer has 0.8M parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=depth,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    return LlamaForCausalLM(config).eval()


def batch_of(samples: int) -> CalibrationBatch:
    """`samples` random samples of SAMPLE tokens."""
    ids = torch.randint(0, 1000, (samples, SAMPLE), generator=torch.Generator().manual_seed(0))
    return CalibrationBatch(ids, torch.ones_like(ids), "random")


@torch.no_grad()
def search(model: LlamaForCausalLM, batch: CalibrationBatch) -> None:
    """One search, from the calibration batch to the last decision."""
    found = laco(Walk(decoder_of(model), batch, SETTINGS), SETTINGS, None, None)
    assert not any(candidate.accepted for candidate in found.candidates)


def counted_layer_runs(model: LlamaForCausalLM, batch: CalibrationBatch) -> int:
    """Layer runs of one search, counted."""
    runs: list[None] = []
    handles = [layer.register_forward_hook(lambda *_: runs.append(None)) for layer in model.model.layers]
    search(model, batch)
    for handle in handles:
        handle.remove()
    return len(runs)


def keep_freed_memory() -> None:
    """Let glibc's malloc keep what is freed, for the rest of the process (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD)."""
    libc = ctypes.CDLL("libc.so.6")
    for option in (-3, -1):
        assert libc.mallopt(option, 1 << 30) == 1


def time_in_turns(cases: Sequence[Case], models: dict[int, LlamaForCausalLM], runs: int) -> None:
    """Add `runs` timings to each of `cases`."""
    for number in range(runs):
        for case in cases:
            batch = batch_of(case.samples)
            began = time.process_time()
            search(models[case.depth], batch)
            case.seconds.append(time.process_time() - began)
        print(f"round {number + 1} of {runs}", flush=True)


def medians(cases: Sequence[Case]) -> list[float]:
    """Median seconds of each of `cases`."""
    return [statistics.median(case.seconds) for case in cases]


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Slope of the least-squares line through (log x, log y)."""
    return statistics.linear_regression([math.log(value) for value in x], [math.log(value) for value in y]).slope


def row(case: Case) -> dict[str, Any]:
    """What was measured of `case`."""
    return {
        "case": case.name,
        "depth": case.depth,
        "tokens": case.tokens,
        "candidates": case.depth - SETTINGS.layers_per_merge,
        "layer_runs": case.layer_runs,
        "cpu_s": statistics.median(case.seconds),
        "cpu_s_all": case.seconds,
        "ms_per_layer_run": 1000 * statistics.median(case.seconds) / case.layer_runs,
    }


def main() -> None:
    """Time all cases in turns, fit, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--output", default=None, help="name of the results file; none: print only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    models = {depth: small_llama(depth) for depth in DEPTHS}
    by_depth = [Case("depth", depth, 512 // SAMPLE) for depth in DEPTHS]
    by_tokens, kept = (
        [Case(name, 16, tokens // SAMPLE) for tokens in TOKENS] for name in ("tokens", "tokens_memory_kept")
    )
    for case in by_depth:  # warms up too
        assert counted_layer_runs(models[case.depth], batch_of(case.samples)) == case.layer_runs, case
    time_in_turns([*by_depth, *by_tokens], models, options.runs)
    keep_freed_memory()
    time_in_turns(kept, models, options.runs)
    results = {
        "measured": [row(case) for case in (*by_depth, *by_tokens, *kept)],
        "exponents": {
            "time_over_layer_runs": exponent([case.layer_runs for case in by_depth], medians(by_depth)),
            "time_over_depth": exponent(DEPTHS, medians(by_depth)),
            "layer_runs_over_depth": exponent(DEPTHS, [case.layer_runs for case in by_depth]),
            "time_over_tokens": exponent(TOKENS, medians(by_tokens)),
            "time_over_tokens_memory_kept": exponent(TOKENS, medians(kept)),
        },
    }
    for found in results["measured"]:
        print({key: value for key, value in found.items() if key != "cpu_s_all"})
    print(results["exponents"])
    if options.output:
        print(write_results(options.output, results))


if __name__ == "__main__":
    main()
