"""Where a teacher comes from: a second model on the device, or what such a model once said, on disk."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PretrainedConfig, PreTrainedModel

from laco_train.collapse import fingerprint
from laco_train.errors import InputError
from laco_train.models import load_config, load_model, resolve_folder
from laco_train.models.checks import SOURCE, check_weight_files
from laco_train.models.sources import require_safetensors
from laco_train.progress import bar
from laco_train.settings import ModelSettings
from laco_train.training.data import PackedText, collate
from laco_train.training.distill import Lesson, Teacher, matched_layers, outputs
from laco_train.training.lessons import TOP, Shape, open_lessons
from laco_train.training.loss import Batch

KEY = "model.distill.teacher"
_SAMPLED = 1024


class TeacherOnDevice:
    """The teacher itself, asked anew for each batch.

    Args:
        model: frozen, in eval mode, on the device.
        layers: its layers (from 0) whose states the student's layers are held against, one for each of those.
        logits: whether its distributions are wanted.
    """

    def __init__(self, model: PreTrainedModel, layers: tuple[int, ...], *, logits: bool):
        self.model = model
        self.layers = layers
        self.logits = logits

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Lesson:
        """One forward pass."""
        logits, states = outputs(self.model, batch, hidden=bool(self.layers))
        return Lesson(logits if self.logits else None, hidden=tuple(states[layer] for layer in self.layers))


@dataclass(frozen=True)
class Place:
    """Where and how the student trains, and so the teacher speaks.

    Attributes:
        device: of both.
        dtype: of the weights of both.
        precision: Lightning's name of the precision under which both compute.
        context: that precision as a context manager.
    """

    device: torch.device
    dtype: torch.dtype
    precision: str
    context: Callable[[], AbstractContextManager[Any]]


def make_teacher(
    settings: ModelSettings, lineage: tuple[tuple[int, ...], ...], source_depth: int, data: PackedText, place: Place
) -> Teacher:
    """The teacher that `settings.distill` asks for.

    A precomputed one speaks once about all training blocks, unless it did so in an earlier run, and leaves the device;
    `data` then looks up for each batch what was said about it.

    Args:
        lineage, source_depth: of the student's plan.
        data: after its setup.

    Raises:
        InputError: a teacher that can't be read, of another vocabulary, or (for hidden states) another width or depth;
            too little room on the disk.
    """
    s = settings.distill
    layers = matched_layers(lineage, source_depth) if s.hidden > 0 else ()
    model = _load(settings, source_depth if layers else None, place.dtype)
    if not s.precomputed:
        return TeacherOnDevice(model.to(place.device), layers, logits=s.logits > 0)  # type: ignore[arg-type]
    shape = Shape(
        blocks=len(data.train_blocks),
        tokens=data.settings.block_size,
        top=min(TOP, rows(model)) if s.logits > 0 else 0,
        vocabulary=rows(model),
        layers=layers,
        width=model.config.hidden_size,
        dtype=place.dtype,
        temperature=s.temperature,
    )
    key = [identity(model), place.precision, data.summary()["train"]["sha256"]]
    book = open_lessons(shape, key, lambda: _spoken(model, shape, data, place))
    data.accompany(book.look_up)
    return book


def rows(model: PreTrainedModel) -> int:
    """Rows of the embeddings, which is the width of the logits."""
    return len(next(model.get_input_embeddings().parameters()))


def check_teacher(student: PretrainedConfig, teacher: PretrainedConfig, source: str, source_depth: int | None) -> None:
    """Refuse a teacher whose distributions, or whose states where `source_depth` is given, mean something else.

    Raises:
        InputError: another vocabulary, width or depth.
    """
    pairs = [("vocab_size", "a vocabulary", student.vocab_size)]
    if source_depth is not None:
        pairs.append(("hidden_size", "a width", student.hidden_size))
        pairs.append(("num_hidden_layers", "a depth", source_depth))
    for name, what, expected in pairs:
        found = getattr(teacher, name)
        if found != expected:
            raise InputError(KEY, f"{source} has {what} of {found}, and model.source one of {expected}; name another")


def check_source(settings: ModelSettings, source_depth: int | None) -> None:
    """Refuse the teacher of `settings` by its config and the names of its files; no weights are read.

    Args:
        source_depth: layers of the model that was collapsed, where hidden states are compared.

    Raises:
        InputError: it can't be read, or see `check_teacher`.
    """
    trusted, source = settings.trust_remote_code, teacher_of(settings)
    student = load_config(settings.source, trust_remote_code=trusted)
    with _naming_teacher():
        teacher = load_config(source, trust_remote_code=trusted)
        folder = resolve_folder(source)
        if isinstance(folder, Path):
            check_weight_files(folder, source)
        else:
            require_safetensors(folder)
    check_teacher(student, teacher, source, source_depth)


def teacher_of(settings: ModelSettings) -> str:
    """What the teacher is loaded from."""
    return settings.source if settings.distill.teacher is None else settings.distill.teacher


@contextmanager
def _naming_teacher() -> Iterator[None]:
    """Let what is wrong with a model name the teacher's key, unless another key mends it."""
    try:
        yield
    except InputError as error:
        if error.key != SOURCE:
            raise
        raise InputError(KEY, str(error).removeprefix(f"{SOURCE}: ").replace(SOURCE, KEY)) from error


def identity(model: PreTrainedModel) -> str:
    """Hex digest that tells `model` from others, also from one fine-tuned without its norms; cheap on any size."""
    digest = hashlib.sha256(fingerprint(model).encode())
    for parameter in model.parameters():
        values = parameter.detach().flatten()
        sample = values[:: max(1, len(values) // _SAMPLED)]
        digest.update(sample.to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _load(settings: ModelSettings, source_depth: int | None, dtype: torch.dtype) -> PreTrainedModel:
    """The teacher on the CPU, frozen and in eval mode."""
    check_source(settings, source_depth)
    with _naming_teacher():
        model = load_model(teacher_of(settings), dtype=dtype, trust_remote_code=settings.trust_remote_code)
    return model.requires_grad_(False)


def _spoken(model: PreTrainedModel, shape: Shape, data: PackedText, place: Place) -> Iterator[Lesson]:
    """What `model` says about each batch of training blocks, in order; it is on the device meanwhile."""
    teacher = TeacherOnDevice(model.to(place.device), shape.layers, logits=shape.top > 0)  # type: ignore[arg-type]
    loader = DataLoader(data.train_blocks, batch_size=data.settings.batch_size, collate_fn=collate)
    with bar() as progress:
        for batch in progress.track(loader, description="The teacher reads the training blocks"):
            with place.context():
                lesson = teacher({name: value.to(place.device) for name, value in batch.items()})
            yield lesson
