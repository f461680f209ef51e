"""Inference of a study's exports: batch size 1, in the type that they were exported in."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from laco_train.inference.load import load_as_saved
from laco_train.inference.measure import Measured, Workload, in_words, measure, memory_in_words

WORK = Workload()


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


def measure_speeds(
    folders: Sequence[Path],
    on_turn: Callable[[int, int], None] | None = None,
    *,
    trust_remote_code: bool = False,
) -> Speeds:
    """Measure the exports in `folders` by turns; see `measure`.

    Args:
        folders: Hugging Face folders.
        on_turn: called after each model's turn with how many are done, of how many.
        trust_remote_code: run Python code that comes with the models.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    load = partial(load_as_saved, trust_remote_code=trust_remote_code)
    found = measure({str(folder): partial(load, str(folder)) for folder in folders}, WORK, device, on_turn)
    method = (
        f"prompt of {WORK.prompt} tokens, {WORK.new} generated after the first, batch 1, the type of the export, plain "
        f"Transformers, medians of {WORK.turns} turns; {memory_in_words(device)}"
    )
    return Speeds({folder: _speed(found[str(folder)]) for folder in folders}, in_words(device), method)


def _speed(measured: Measured | str) -> Speed | str:
    turns = measured if isinstance(measured, str) else measured.turns[0]
    if isinstance(turns, str):
        return turns
    return Speed(
        prefill=statistics.median(turn.prefill for turn in turns),
        decode=statistics.median(turn.decode for turn in turns),
        gib=max(turn.gib for turn in turns),
    )
