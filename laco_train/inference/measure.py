"""Reading a prompt and writing after it, timed: models take turns, so that a slow minute strikes all alike."""

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from laco_train.collapse import count_parameters

FAILURES = (OSError, ValueError, RuntimeError, TypeError, IndexError)
"""Of a model that can't be loaded, has no room, or does not take this many positions: the others are measured on."""


@dataclass(frozen=True)
class Workload:
    """What every model does in each of its turns.

    Attributes:
        batches: sequences at a time, one measurement each.
        prompt: tokens of each sequence's prompt.
        new: tokens generated greedily after the first one, whose time is that of the prompt.
        turns: of each model.
    """

    batches: tuple[int, ...] = (1,)
    prompt: int = 128
    new: int = 32
    turns: int = 5

    @property
    def positions(self) -> int:
        """Positions that a model must have."""
        return self.prompt + self.new


@dataclass(frozen=True)
class Turn:
    """One turn of one model at one batch size.

    Attributes:
        first: seconds from the prompt to its first token.
        prefill: tokens of prompts per second in that time.
        decode: tokens generated per second after it, over all sequences.
        gib: on a GPU the most that was allocated; on the CPU weights and KV cache.
    """

    first: float
    prefill: float
    decode: float
    gib: float


@dataclass(frozen=True)
class Measured:
    """One model.

    Attributes:
        layers: decoder layers.
        parameters: all of them, tied ones once.
        dtype: of its weights.
        turns: for each batch size its turns, or why there are none.
    """

    layers: int
    parameters: int
    dtype: str
    turns: tuple[tuple[Turn, ...] | str, ...]


def measure(
    models: Mapping[str, Callable[[], PreTrainedModel]],
    work: Workload,
    device: torch.device,
    on_turn: Callable[[int, int], None] | None = None,
) -> dict[str, Measured | str]:
    """Measure `models`, one after another in each turn.

    A model is loaded anew each time it has its turn: no two need room at once.

    Args:
        models: by name, what loads each on the CPU, in eval mode.
        work: what they do.
        device: where.
        on_turn: called after each model's turn with how many are done, of how many.

    Returns:
        By name what was measured, or why the model could not be loaded.
    """
    found: dict[str, Measured | str] = {}
    for turn in range(work.turns):
        for index, (name, load) in enumerate(models.items()):
            before = found.get(name)
            if not isinstance(before, str):
                found[name] = _one_turn(load, work, device, before)
            if on_turn is not None:
                on_turn(turn * len(models) + index + 1, work.turns * len(models))
    return found


def in_words(device: torch.device) -> str:
    """`device` for a reader."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads" if torch.get_num_threads() > 1 else "CPU, 1 thread"


def memory_in_words(device: torch.device) -> str:
    """What `Turn.gib` is on `device`."""
    return "the most memory allocated" if device.type == "cuda" else "memory of weights and cache"


def reason(error: BaseException) -> str:
    """The first line of `error`, or its kind."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _one_turn(
    load: Callable[[], PreTrainedModel], work: Workload, device: torch.device, before: Measured | None
) -> Measured | str:
    """`before` with one turn more."""
    model: Any = None
    try:
        model = load().to(device)  # type: ignore[arg-type]  # Transformers wraps to() for bitsandbytes
        earlier = before.turns if before is not None else ((),) * len(work.batches)
        turns = tuple(
            done if isinstance(done, str) else _tried(model, batch, work, done)
            for batch, done in zip(work.batches, earlier, strict=True)
        )
        depth = model.config.get_text_config().num_hidden_layers
        return Measured(depth, count_parameters(model), str(model.dtype).removeprefix("torch."), turns)
    except FAILURES as error:
        return reason(error)
    finally:
        del model
        _empty(device)


def _tried(model: PreTrainedModel, batch: int, work: Workload, done: tuple[Turn, ...]) -> tuple[Turn, ...] | str:
    try:
        return (*done, _timed(model, batch, work))
    except FAILURES as error:
        failure = reason(error)
    _empty(model.device)  # not above, where the error still holds what did not fit
    return failure


def _empty(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _timed(model: PreTrainedModel, batch: int, work: Workload) -> Turn:
    device = model.device
    vocabulary: int = model.get_input_embeddings().num_embeddings  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(vocabulary, (batch, work.prompt), generator=generator).to(device)
    _generate(model, prompts, min(2, work.new))  # warms up, within the positions that were checked
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    first, rest, cache = _generate(model, prompts, work.new)
    held = sum(t.numel() * t.element_size() for t in {*model.parameters(), *model.buffers()}) + cache
    if device.type == "cuda":
        held = torch.cuda.max_memory_allocated(device)
    return Turn(first, prompts.numel() / first, batch * work.new / rest, held / 2**30)


@torch.inference_mode()
def _generate(model: PreTrainedModel, prompts: Tensor, new: int) -> tuple[float, float, int]:
    """Seconds to the first token, seconds of `new` greedy tokens after it, bytes of the cache at the end."""
    began = _now(prompts.device)
    output = model(prompts, use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1:].argmax(-1)
    first = _now(prompts.device)
    for _ in range(new):
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
    done = _now(prompts.device)
    layers = output.past_key_values.layers
    cache = sum(t.numel() * t.element_size() for layer in layers for t in (layer.keys, layer.values))
    return first - began, done - first, cache


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
