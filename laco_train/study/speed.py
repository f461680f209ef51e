"""Inference of exported models, measured in turn: tokens per second of prefill and of decoding, and memory."""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

TURNS = 5
PROMPT = 128
NEW = 32
_FAILURES = (OSError, ValueError, RuntimeError, TypeError, IndexError)
"""Of a model that can't be loaded, has no room, or does not take this many positions: no reason to lose a report."""


@dataclass(frozen=True)
class Speed:
    """Inference of one model at batch size 1.

    Attributes:
        prefill: tokens of the prompt per second, median over turns.
        decode: tokens generated per second, median over turns.
        gib: on a GPU the most that was allocated; on the CPU weights and KV cache.
    """

    prefill: float
    decode: float
    gib: float


@dataclass(frozen=True)
class Speeds:
    """What was measured, and on what.

    Attributes:
        models: of each folder; its speed, or why there is none.
        device: in words.
        method: in words.
    """

    models: dict[Path, Speed | str]
    device: str
    method: str


def measure_speeds(folders: Sequence[Path], on_turn: Callable[[int, int], None] | None = None) -> Speeds:
    """Measure the exports in `folders`, one after another in each turn, so that a slow minute strikes all alike.

    A model is loaded anew each time it has its turn: no two need room at once.

    Args:
        folders: Hugging Face folders.
        on_turn: called after each model's turn with how many are done, of how many.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    turns: dict[Path, list[Speed]] = {folder: [] for folder in folders}
    broken: dict[Path, str] = {}
    for turn in range(TURNS):
        for index, folder in enumerate(folders):
            if folder not in broken:
                try:
                    turns[folder].append(_one_turn(folder, device))
                except _FAILURES as error:
                    broken[folder] = str(error).splitlines()[0]
            if on_turn is not None:
                on_turn(turn * len(folders) + index + 1, TURNS * len(folders))
    measured: dict[Path, Speed | str] = {
        folder: broken[folder] if folder in broken else _median(turns[folder]) for folder in folders
    }
    memory = "the most memory allocated" if device.type == "cuda" else "memory of weights and cache"
    method = (
        f"prompt of {PROMPT} tokens, {NEW} generated, batch 1, the type of the export, plain Transformers, "
        f"medians of {TURNS} turns; {memory}"
    )
    return Speeds(measured, _in_words(device), method)


def _median(turns: Sequence[Speed]) -> Speed:
    return Speed(
        prefill=statistics.median(turn.prefill for turn in turns),
        decode=statistics.median(turn.decode for turn in turns),
        gib=max(turn.gib for turn in turns),
    )


def _in_words(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads" if torch.get_num_threads() > 1 else "CPU, 1 thread"


def _one_turn(folder: Path, device: torch.device) -> Speed:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    model.to(device)
    try:
        vocabulary = model.get_input_embeddings().num_embeddings
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(vocabulary, (1, PROMPT), generator=generator).to(device)
        _generate(model, prompt, 2)  # warms up
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        prefill, decode, cache = _generate(model, prompt, NEW)
        held = sum(t.numel() * t.element_size() for t in {*model.parameters(), *model.buffers()}) + cache
        if device.type == "cuda":
            held = torch.cuda.max_memory_allocated(device)
        return Speed(prompt.shape[1] / prefill, NEW / decode, held / 2**30)
    finally:
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


@torch.inference_mode()
def _generate(model: PreTrainedModel, prompt: Tensor, new: int) -> tuple[float, float, int]:
    """Seconds of the prompt, seconds of `new` greedy steps after it, bytes of the cache at the end."""
    began = _now(prompt.device)
    output = model(prompt, use_cache=True, logits_to_keep=1)
    read = _now(prompt.device)
    for _ in range(new):
        token = output.logits[:, -1:].argmax(-1)
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
    done = _now(prompt.device)
    layers = output.past_key_values.layers
    cache = sum(t.numel() * t.element_size() for layer in layers for t in (layer.keys, layer.values))
    return read - began, done - read, cache


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
