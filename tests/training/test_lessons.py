"""A precomputed teacher: the same lessons from disk, written once and whole, and what it refuses."""

import copy
import errno
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from laco_train.errors import InputError
from laco_train.settings import DistillSettings
from laco_train.training.distill import Distillation, Lesson
from laco_train.training.lessons import LessonBook, Shape, open_lessons, refuse_too_large
from laco_train.training.loss import Batch
from laco_train.training.teacher import TeacherOnDevice, check_teacher, identity

SHAPE = Shape(
    blocks=5, tokens=12, top=320, vocabulary=320, layers=(1, 2), width=32, dtype=torch.float32, temperature=2.0
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for each test."""
    monkeypatch.setenv("LACO_TRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lessons"


@pytest.fixture
def blocks() -> Batch:
    """Five blocks of twelve tokens."""
    ids = torch.randint(4, 300, (5, 12), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.clone(), "position_ids": torch.arange(12).expand(5, 12)}


@pytest.fixture
def teacher(tiny_llama: Callable[..., LlamaForCausalLM]) -> TeacherOnDevice:
    """A frozen Llama of three layers."""
    return TeacherOnDevice(tiny_llama(layers=3).requires_grad_(False), (1, 2), logits=True)


def speaking(teacher: Callable[[Batch], Lesson], blocks: Batch) -> Callable[[], Iterator[Lesson]]:
    """Two blocks at a time, so that the last batch holds one."""
    return lambda: (teacher({n: v[start : start + 2] for n, v in blocks.items()}) for start in (0, 2, 4))


def silent() -> Iterator[Lesson]:
    raise AssertionError("asked again")


def shuffled(blocks: Batch) -> Batch:
    order = torch.tensor([3, 0, 4])
    return {**{name: value[order] for name, value in blocks.items()}, "indices": order}


@pytest.mark.parametrize(("logits", "hidden"), [(0.5, 0.0), (0.0, 0.5), (0.4, 0.3)])
def test_all_tokens_named_give_the_loss_of_a_teacher_on_the_device(
    tiny_llama: Callable[..., LlamaForCausalLM], teacher: TeacherOnDevice, blocks: Batch, logits: float, hidden: float
) -> None:
    said = TeacherOnDevice(teacher.model, teacher.layers if hidden else (), logits=logits > 0)
    shape = replace(SHAPE, top=320 if logits else 0, layers=said.layers)
    book = open_lessons(shape, ["k"], speaking(said, blocks))
    student, settings = tiny_llama(layers=2, seed=4), DistillSettings(logits, 2.0, hidden)
    batch = shuffled(blocks)
    found = Distillation(settings, book)(student, book.look_up(batch))
    expected = Distillation(settings, said)(student, batch)
    torch.testing.assert_close(vars(found), vars(expected), rtol=1e-6, atol=1e-6)
    assert (found.logits > 0.01) == (logits > 0)
    assert (found.hidden > 0.01) == (hidden > 0)
    gradients = [torch.autograd.grad(loss.total, list(student.parameters())) for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_few_tokens_named_say_all_but_what_lies_within_the_others(
    tiny_llama: Callable[..., LlamaForCausalLM], teacher: TeacherOnDevice, blocks: Batch
) -> None:
    teacher.model.lm_head.weight.data *= 8  # as sure of itself as real models are: 64 tokens hold nearly all
    said, student = TeacherOnDevice(teacher.model, (), logits=True), tiny_llama(layers=2, seed=4)
    losses = []
    for top in (4, 64, 320):
        shape = replace(SHAPE, top=top, layers=(), temperature=1.0)
        book = open_lessons(shape, ["k"], speaking(said, blocks))
        losses.append(Distillation(DistillSettings(1.0), book)(student, book.look_up(shuffled(blocks))).logits.item())
    few, many, every = losses
    assert 0.3 * every < few < many <= every
    assert many > 0.95 * every


def test_written_once(teacher: TeacherOnDevice, blocks: Batch, cache: Path) -> None:
    first = open_lessons(SHAPE, ["k"], speaking(teacher, blocks))
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    assert sum(path.stat().st_size for path in folder.iterdir()) == SHAPE.bytes
    again = open_lessons(SHAPE, ["k"], silent)
    torch.testing.assert_close(again.look_up(shuffled(blocks)), first.look_up(shuffled(blocks)), rtol=0, atol=0)


@pytest.mark.parametrize(
    "change", [{"temperature": 1.0}, {"top": 7}, {"layers": (0, 2)}, {"dtype": torch.bfloat16}, {"key": ["other"]}]
)
def test_other_lessons_are_not_mistaken_for_these(
    teacher: TeacherOnDevice, blocks: Batch, change: dict[str, Any]
) -> None:
    open_lessons(SHAPE, ["k"], speaking(teacher, blocks))
    key = change.pop("key", ["k"])
    with pytest.raises(AssertionError, match="asked again"):
        open_lessons(replace(SHAPE, **change), key, silent)


def test_an_interrupted_pass_leaves_nothing(teacher: TeacherOnDevice, blocks: Batch, cache: Path) -> None:
    def interrupted() -> Iterator[Lesson]:
        yield next(speaking(teacher, blocks)())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_lessons(SHAPE, ["k"], interrupted)
    assert [path for path in cache.iterdir() if path.is_dir()] == []
    left_by_a_kill = next(cache.glob("*.lock")).with_suffix(".partial")
    left_by_a_kill.mkdir()
    (left_by_a_kill / "outcomes").write_bytes(b"\xff" * 100)
    book = open_lessons(SHAPE, ["k"], speaking(teacher, blocks))
    whole = teacher(blocks).outcomes
    assert whole is not None
    found = book.look_up({"indices": torch.arange(5)})
    expected = (whole / 2).log_softmax(-1).gather(-1, found["ids"].flatten(0, 1).long())
    torch.testing.assert_close(found["outcomes"].flatten(0, 1), expected)


def test_states_in_bfloat16_come_back_to_the_bit(tiny_llama: Callable[..., LlamaForCausalLM], blocks: Batch) -> None:
    teacher = TeacherOnDevice(tiny_llama(layers=3).bfloat16(), (0, 2), logits=False)
    shape = replace(SHAPE, top=0, layers=(0, 2), dtype=torch.bfloat16)
    book = open_lessons(shape, ["k"], lambda: iter([teacher(blocks)]))
    found, expected = book(book.look_up({"indices": torch.arange(5)})), teacher(blocks)
    assert found.hidden[1].dtype == torch.bfloat16
    torch.testing.assert_close(found.hidden, expected.hidden, rtol=0, atol=0)
    assert found.outcomes is None


def test_too_little_room(teacher: TeacherOnDevice, blocks: Batch, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=SHAPE.bytes - 1))
    said = r"^model\.distill\.precomputed: needs 0\.00 GB in .*lessons, which has 0\.00 GB free; set it to false"
    with pytest.raises(InputError, match=said):
        open_lessons(SHAPE, ["k"], silent)
    assert [path for path in cache.iterdir() if path.is_dir()] == []
    refuse_too_large(SHAPE.bytes, SHAPE.bytes, cache)


def test_a_disk_that_fills_up_meanwhile(teacher: TeacherOnDevice, blocks: Batch, cache: Path) -> None:
    def full() -> Iterator[Lesson]:
        yield next(speaking(teacher, blocks)())
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(
        InputError, match=r"^model\.distill\.precomputed: can't write .*No space left.*LACO_TRAIN_CACHE"
    ):
        open_lessons(SHAPE, ["k"], full)
    assert [path for path in cache.iterdir() if path.is_dir()] == []


def test_size_of_real_lessons() -> None:
    shape = Shape(1000, 1024, 64, 49152, (), 576, torch.bfloat16, 1.0)
    assert shape.bytes == 1000 * 1024 * (64 * 8 + 4)
    assert replace(shape, layers=(1, 2, 3)).bytes - shape.bytes == 1000 * 1024 * 3 * 576 * 2


def test_identity_tells_models_of_equal_norms_apart(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    model = tiny_llama(layers=2)
    other = copy.deepcopy(model)
    assert identity(other) == identity(model)
    with torch.no_grad():
        other.model.layers[1].self_attn.q_proj.weight.mul_(1.001)
    assert identity(other) != identity(model)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vocab_size": 321}, "has a vocabulary of 321, and model.source one of 320"),
        ({"hidden_size": 64}, "has a width of 64, and model.source one of 32"),
        ({"num_hidden_layers": 5}, "has a depth of 5, and model.source one of 3"),
    ],
)
def test_teacher_of_another_make(
    tiny_llama: Callable[..., LlamaForCausalLM], change: dict[str, int], said: str
) -> None:
    student = tiny_llama(layers=3).config
    other = copy.deepcopy(student)
    check_teacher(student, other, "other", 3)
    for name, value in change.items():
        setattr(other, name, value)
    with pytest.raises(InputError, match=rf"^model\.distill\.teacher: other {said}"):
        check_teacher(student, other, "other", 3)
    if "vocab_size" not in change:
        check_teacher(student, other, "other", None)  # logits alone ask for no more


def test_book_is_read_only_on_disk(teacher: TeacherOnDevice, blocks: Batch, cache: Path) -> None:
    book = open_lessons(SHAPE, ["k"], speaking(teacher, blocks))
    before = book.look_up(shuffled(blocks))
    book._arrays["outcomes"].zero_()
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    torch.testing.assert_close(LessonBook(folder, SHAPE).look_up(shuffled(blocks)), before, rtol=0, atol=0)
