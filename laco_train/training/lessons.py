"""What a teacher says about every training block, on disk: written once, then read by the index of a block.

Shapes: B blocks of T tokens, K tokens named, L layers, D hidden size.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from laco_train.errors import InputError
from laco_train.models.gguf import cache_root
from laco_train.training.distill import Lesson, coarse
from laco_train.training.loss import Batch

KEY = "model.distill.precomputed"
TOP = 64
"""K: the likeliest tokens whose log-probabilities are kept; of all others only their sum. 8 K + 4 bytes a token."""
_VERSION = 1  # raise it when the same key would give other lessons
_TOKENS_AT_ONCE = 1024


@dataclass(frozen=True)
class Shape:
    """How much is kept, and of what.

    Attributes:
        blocks, tokens: B and T.
        top: K; 0: no distributions.
        vocabulary: tokens of which `top` are kept.
        layers: original layers whose states are kept, one for each of the student's.
        width: D.
        dtype: of the states.
        temperature: of the distributions.
    """

    blocks: int
    tokens: int
    top: int
    vocabulary: int
    layers: tuple[int, ...]
    width: int
    dtype: torch.dtype
    temperature: float

    def arrays(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of each array that is kept, by name."""
        parts: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        if self.top:
            outcomes = self.top + (self.top < self.vocabulary)
            parts["outcomes"] = (self.blocks, self.tokens, outcomes), torch.float32
            parts["ids"] = (self.blocks, self.tokens, self.top), torch.int32
        if self.layers:
            parts["hidden"] = (self.blocks, len(self.layers), self.tokens, self.width), self.dtype
        return parts

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.arrays().values())


class LessonBook:
    """A precomputed teacher.

    Args:
        folder: with one file an array.
        shape: of them.
    """

    def __init__(self, folder: Path, shape: Shape):
        self.shape = shape
        # memory-mapped; a private map, so that nothing can change the files
        self._arrays = {
            name: torch.from_file(str(folder / name), shared=False, size=math.prod(size), dtype=dtype).view(size)
            for name, (size, dtype) in shape.arrays().items()
        }

    def look_up(self, batch: Batch) -> Batch:
        """Rows of the blocks that `batch` names by `indices` (B,), read while those are still on the CPU."""
        rest = dict(batch)
        indices = rest.pop("indices")
        found = {name: array[indices] for name, array in self._arrays.items()}
        if torch.cuda.is_available():  # so that the copy to the device need not be waited for
            found = {name: array.pin_memory() for name, array in found.items()}
        return {**rest, **found}

    def __call__(self, batch: Batch) -> Lesson:
        """The lesson in the rows that `look_up` added."""
        hidden = tuple(state.flatten(0, 1) for state in batch["hidden"].unbind(1)) if self.shape.layers else ()
        if not self.shape.top:
            return Lesson(None, hidden=hidden)
        return Lesson(batch["outcomes"].flatten(0, 1), batch["ids"].flatten(0, 1).long(), hidden)


def open_lessons(shape: Shape, key: Sequence[str], speak: Callable[[], Iterator[Lesson]]) -> LessonBook:
    """The lessons of `key` and `shape` in the cache; on first use they are written from what `speak` yields.

    They appear under their name only when complete. Processes that want the same wait for the first of them.

    Args:
        key: what tells the teacher, its precision and the blocks from others.
        speak: lessons with whole logits, about batches of blocks in order.

    Raises:
        InputError: too little room on the disk.
    """
    parts = {"version": _VERSION, "key": list(key), **asdict(shape), "dtype": str(shape.dtype)}
    root = cache_root() / "lessons"
    folder = root / hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{folder.name}.lock"):
        if not folder.is_dir():
            _write(folder, shape, speak)
    return LessonBook(folder, shape)


def _write(folder: Path, shape: Shape, speak: Callable[[], Iterator[Lesson]]) -> None:
    """Write `folder` beside its place, then rename it; the caller holds the lock."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
    refuse_too_large(shape.bytes, shutil.disk_usage(folder.parent).free, folder.parent)
    print(f"Keeping what the teacher says, once: {shape.bytes / 1e9:.2f} GB in {folder}", flush=True)
    try:
        partial.mkdir()
        with ExitStack() as files:
            opened = {name: files.enter_context((partial / name).open("wb")) for name in shape.arrays()}
            for lesson in speak():
                for name, rows in _rows(lesson, shape).items():
                    opened[name].write(rows.cpu().contiguous().view(torch.uint8).numpy().data)
        partial.rename(folder)
    except OSError as error:
        raise InputError(KEY, f"can't write {folder} ({error}); set LACO_TRAIN_CACHE to a folder with room") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_too_large(size: int, free: int, folder: Path) -> None:
    """InputError if `size` bytes don't fit the `free` ones at `folder`."""
    if size > free:
        raise InputError(
            KEY,
            f"needs {size / 1e9:.2f} GB in {folder}, which has {free / 1e9:.2f} GB free; set it to false, lower "
            "data.max_tokens, or set LACO_TRAIN_CACHE to a folder with room",
        )


def _rows(lesson: Lesson, shape: Shape) -> dict[str, Tensor]:
    """What is kept of a lesson, by the names of the arrays, in their order and types."""
    rows: dict[str, Tensor] = {}
    if lesson.outcomes is not None:
        outcomes, ids = (torch.cat(part) for part in zip(*_named(lesson.outcomes, shape), strict=True))
        rows |= {"outcomes": outcomes, "ids": ids.int()}
    if lesson.hidden:
        states = [state.unflatten(0, (-1, shape.tokens)) for state in lesson.hidden]
        rows["hidden"] = torch.stack(states, dim=1).to(shape.dtype)
    return rows


def _named(logits: Tensor, shape: Shape) -> Iterator[tuple[Tensor, Tensor]]:
    """Log-probabilities and ids of the likeliest tokens, for a slice of tokens at a time."""
    for part in logits.split(_TOKENS_AT_ONCE):
        log_probs = (part.float() / shape.temperature).log_softmax(-1)
        ids = log_probs.topk(shape.top).indices
        yield coarse(log_probs, ids), ids
