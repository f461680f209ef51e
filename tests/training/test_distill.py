"""Distillation losses against slow float64 versions, and the layers that meet."""

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from laco_train.collapse.decoder import decoder_of, keep_layers
from laco_train.collapse.plan import Merge, lineage_after
from laco_train.settings import DistillSettings
from laco_train.training import distill
from laco_train.training.distill import (
    Distillation,
    DistillLoss,
    coarse,
    divergence,
    hidden_error,
    matched_layers,
    next_tokens,
    outputs,
    sum_in_slices,
)
from laco_train.training.loss import Batch, causal_lm_loss
from laco_train.training.teacher import TeacherOnDevice

Models = Callable[..., LlamaForCausalLM]


@pytest.fixture
def sliced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five tokens of the tiny vocabulary at once, so that slices end inside blocks and the last is shorter."""
    monkeypatch.setattr(distill, "ELEMENTS_AT_ONCE", 5 * 320 + 7)


def on_device(teacher: LlamaForCausalLM, *layers: int) -> TeacherOnDevice:
    return TeacherOnDevice(teacher.requires_grad_(False), layers, logits=True)


@pytest.mark.parametrize(
    ("lineage", "depth", "expected"),
    [
        ([(0,), (1,), (2,)], 3, (0, 1, 2)),  # untouched
        ([(0,), (1, 2, 3), (4,)], 5, (0, 3, 4)),  # merged
        ([(0, 1), (2, 3, 4)], 5, (1, 4)),
        ([(0,), (1,), (4,)], 5, (0, 3, 4)),  # 2 and 3 dropped: what 4 expects is what 3 gave
        ([(0,), (1,)], 5, (0, 4)),  # the tail dropped: what the final norm expects
        ([(2,), (3,)], 4, (2, 3)),  # the first layers dropped
        ([(0,), (1, 2), (5,)], 7, (0, 4, 6)),  # merged, then dropped
        ([(3,)], 7, (6,)),
    ],
)
def test_matched_layers(lineage: list[tuple[int, ...]], depth: int, expected: tuple[int, ...]) -> None:
    assert matched_layers(lineage, depth) == expected


@st.composite
def lineages(draw: st.DrawFn) -> tuple[int, tuple[tuple[int, ...], ...]]:
    """Depth and lineage after random merges, or drops, and removals."""
    depth = left = draw(st.integers(1, 12))
    merges = []
    for _ in range(draw(st.integers(0, 4))):
        if left < 2:
            break
        layer = draw(st.integers(0, left - 2))
        merges.append(Merge(layer, draw(st.integers(1, left - 1 - layer)), 0.9))
        left -= merges[-1].absorbed
    dropping = draw(st.booleans())
    firsts = [layer[0] for layer in lineage_after(depth, tuple(merges), (), dropping=dropping)]
    removed = draw(st.sets(st.sampled_from(firsts), max_size=len(firsts) - 1))
    return depth, lineage_after(depth, tuple(merges), tuple(removed), dropping=dropping)


@given(lineages())
def test_every_original_from_the_first_left_on_is_stood_for_once_and_in_order(
    drawn: tuple[int, tuple[tuple[int, ...], ...]],
) -> None:
    depth, lineage = drawn
    owner = {}
    for original in range(lineage[0][0], depth):
        begun = [layer for layer, origins in enumerate(lineage) if origins[0] <= original]
        owner[original] = begun[-1]
    last = {layer: original for original, layer in owner.items()}  # later ones overwrite earlier
    assert matched_layers(lineage, depth) == tuple(last[layer] for layer in range(len(lineage)))
    for layer, origins in enumerate(lineage):
        assert matched_layers(lineage, depth)[layer] >= origins[-1]


def loss_of(student: LlamaForCausalLM, teacher: TeacherOnDevice, batch: Batch, **settings: float) -> DistillLoss:
    return Distillation(DistillSettings(**settings), teacher)(student, batch)  # type: ignore[arg-type]


def test_the_original_has_nothing_to_learn_from_itself(tiny_llama: Models, batch: Batch) -> None:
    model = tiny_llama(layers=4)
    lineage = [(index,) for index in range(4)]
    teacher = on_device(copy.deepcopy(model), *matched_layers(lineage, 4))
    loss = loss_of(model, teacher, batch, logits=0.25, hidden=2.0, temperature=3.0)
    assert loss.hidden.item() == 0
    assert loss.logits.item() == pytest.approx(0, abs=1e-6)
    plain = causal_lm_loss(model, batch).item()
    assert loss.next_token.item() == pytest.approx(plain, rel=1e-6)
    assert loss.total.item() == pytest.approx(0.75 * plain, rel=1e-5)
    wrong = on_device(teacher.model, 0, 0, 1, 2)
    assert loss_of(model, wrong, batch, hidden=2.0).hidden.item() > 0.01


@pytest.mark.parametrize(
    ("lineage", "kept"),
    [
        ([(0,), (1, 2, 3), (4,), (5,)], [0, 3, 4, 5]),  # layers 1 and 2 do nothing, so the merged layer is layer 3
        ([(0,), (3,), (4,), (5,)], [0, 3, 4, 5]),  # the same two dropped
    ],
)
def test_an_exact_stand_in_for_a_merged_layer_has_no_error(
    tiny_llama: Models, batch: Batch, lineage: list[tuple[int, ...]], kept: list[int]
) -> None:
    original = tiny_llama(layers=6)
    for index in (1, 2):
        layer = original.model.layers[index]
        for matrix in (layer.self_attn.o_proj, layer.mlp.down_proj):
            torch.nn.init.zeros_(matrix.weight)
    student = copy.deepcopy(original)
    keep_layers(decoder_of(student), kept)
    matched = matched_layers(lineage, 6)
    assert loss_of(student, on_device(original, *matched), batch, hidden=1.0).hidden.item() == 0
    for wrong in ((0, 1, 4, 5), (0, 1, 2, 5)):  # the first of the merged; the same place from the bottom
        assert loss_of(student, on_device(original, *wrong), batch, hidden=1.0).hidden.item() > 1e-3


def slowly(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> tuple[float, float]:
    """Cross entropy and T squared KL, token by token in Python's float64."""
    entropies, apart = [], []
    blocks, tokens = student.shape[:2]
    for block in range(blocks):
        for token in range(tokens - 1):
            target = int(labels[block, token + 1])
            if target == -100:
                continue
            z, t = student[block, token].tolist(), teacher[block, token].tolist()
            entropies.append(math.log(math.fsum(math.exp(v) for v in z)) - z[target])
            z, t = [v / temperature for v in z], [v / temperature for v in t]
            log_z, log_t = (math.log(math.fsum(map(math.exp, values))) for values in (z, t))
            apart.append(
                math.fsum(math.exp(b - log_t) * ((b - log_t) - (a - log_z)) for a, b in zip(z, t, strict=True))
            )
    assert len(entropies) > 0
    return math.fsum(entropies) / len(entropies), temperature**2 * math.fsum(apart) / len(apart)


def slow_hidden(student: list[Tensor], teacher: list[Tensor]) -> float:
    errors = []
    for one, other in zip(student, teacher, strict=True):
        for s, t in zip(one.double(), other.double(), strict=True):
            errors.append(float((s - t) @ (s - t) / (t @ t)))
    return math.fsum(errors) / len(errors)


@pytest.mark.usefixtures("sliced")
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_loss_is_that_of_the_slow_version(tiny_llama: Models, batch: Batch, temperature: float) -> None:
    student, original = tiny_llama(layers=2, seed=1), tiny_llama(layers=4)
    loss = loss_of(student, on_device(original, 1, 3), batch, logits=0.3, hidden=0.7, temperature=temperature)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    with torch.no_grad():
        one = student(**inputs, use_cache=False, output_hidden_states=True)
        other = original(**inputs, use_cache=False, output_hidden_states=True)
    entropy, apart = slowly(one.logits, other.logits, batch["labels"], temperature)
    counted = next_tokens(batch) != -100
    states = [other.hidden_states[2], other.hidden_states[4]]
    hidden = slow_hidden([s[counted] for s in one.hidden_states[1:]], [s[counted] for s in states])
    assert loss.next_token.item() == pytest.approx(entropy, rel=1e-5)
    assert loss.logits.item() == pytest.approx(apart, rel=1e-5)
    assert loss.hidden.item() == pytest.approx(hidden, rel=1e-5)
    assert loss.total.item() == pytest.approx(0.7 * entropy + 0.3 * apart + 0.7 * hidden, rel=1e-5)


def plainly(student: LlamaForCausalLM, original: LlamaForCausalLM, batch: Batch, temperature: float) -> Tensor:
    """The same loss with every softmax whole, by plain autograd."""
    with torch.no_grad():
        target, states = outputs(original, batch, hidden=True)
    logits, own = outputs(student, batch, hidden=True)
    labels = next_tokens(batch).flatten()
    kept = labels != -100
    entropy = cross_entropy(logits[kept], labels[kept])
    p, q = ((z[kept] / temperature).log_softmax(-1) for z in (target, logits))
    apart = temperature**2 * kl_div(q, p, log_target=True, reduction="batchmean")
    hidden = torch.stack(
        [hidden_error(own[0][kept], states[1][kept]), hidden_error(own[1][kept], states[3][kept])]
    ).mean()
    return 0.7 * entropy + 0.3 * apart + 0.7 * hidden


@pytest.mark.usefixtures("sliced")
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_gradient_is_that_of_plain_autograd(tiny_llama: Models, batch: Batch, temperature: float) -> None:
    student, original = tiny_llama(layers=2, seed=1), tiny_llama(layers=4)
    parameters = list(student.parameters())
    loss = loss_of(student, on_device(original, 1, 3), batch, logits=0.3, hidden=0.7, temperature=temperature)
    expected = torch.autograd.grad(plainly(student, original, batch, temperature), parameters)
    found = torch.autograd.grad(loss.total, parameters)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert max(float(g.abs().max()) for g in expected) > 1e-2


@pytest.mark.usefixtures("sliced")
def test_gradient_of_logits_is_exact_to_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(23, 320, generator=generator)).requires_grad_()
    target = 3 * torch.randn(23, 320, generator=generator)
    total, parts = sum_in_slices(
        logits, lambda part, rows: divergence(part, target[rows], None, 2.0).sum()[None] * 4, (0.5,)
    )
    (found,) = torch.autograd.grad(3 * total, logits)
    whole = logits.detach().double().requires_grad_()
    p, q = ((z.double() / 2).log_softmax(-1) for z in (target, whole))
    expected_total = 4 * kl_div(q, p, log_target=True, reduction="sum")
    (expected,) = torch.autograd.grad(3 * 0.5 * expected_total, whole)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(parts.double(), expected_total.detach()[None], rtol=1e-6, atol=0)
    assert not parts.requires_grad


def test_without_a_graph_no_gradient_is_made(tiny_llama: Models, batch: Batch) -> None:
    student, teacher = tiny_llama(layers=2, seed=1), on_device(tiny_llama(layers=2))
    whole = loss_of(student, teacher, batch, logits=0.5)
    with torch.no_grad():
        loss = loss_of(student, teacher, batch, logits=0.5)
    assert not loss.total.requires_grad
    assert loss.total.item() == whole.total.item()


class Largest(TorchDispatchMode):
    """Notes the most numbers that a float32 tensor made meanwhile holds."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple) else (out,):
            if isinstance(value, Tensor) and value.dtype == torch.float32:
                self.numbers = max(self.numbers, value.numel())
        return out


@pytest.mark.usefixtures("sliced")
@pytest.mark.parametrize("top", [None, 10])
def test_no_whole_softmax_exists(top: int | None) -> None:
    logits = torch.randn(64, 320).bfloat16().requires_grad_()
    teacher = torch.randn(64, 320).bfloat16()
    ids = None if top is None else teacher.topk(top).indices
    outcomes = teacher if ids is None else coarse(teacher.float().log_softmax(-1), ids)

    def terms(part: Tensor, rows: slice) -> Tensor:
        return divergence(part, outcomes[rows], None if ids is None else ids[rows], 2.0).sum()[None]

    with Largest() as largest:
        sum_in_slices(logits, terms, (1.0,))[0].backward()
    assert largest.numbers == 5 * 320
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


def test_a_batch_without_targets_teaches_nothing(tiny_llama: Models, batch: Batch) -> None:
    batch["labels"][:] = -100
    loss = loss_of(tiny_llama(layers=2, seed=1), on_device(tiny_llama(layers=2)), batch, logits=0.5)
    assert loss.total.item() == 0


def test_padding_and_prompts_do_not_count_for_logits(tiny_llama: Models, batch: Batch) -> None:
    student, teacher = tiny_llama(layers=2, seed=1), on_device(tiny_llama(layers=2))
    before = loss_of(student, teacher, batch, logits=1.0)
    batch["input_ids"][1, 13:] = 7  # none of these predicts a target, or is seen by one that does
    assert loss_of(student, teacher, batch, logits=1.0).total.item() == before.total.item()


@given(st.integers(0, 10_000), st.integers(2, 40), st.floats(0.5, 4.0))
@settings(deadline=None, max_examples=60)
def test_fewer_named_tokens_never_say_more(seed: int, vocabulary: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(3, vocabulary, generator=generator) for _ in range(2))
    log_probs = (teacher / temperature).log_softmax(-1)
    order = log_probs.sort(descending=True).indices
    whole = divergence(student, teacher, None, temperature)
    found = [
        divergence(student, coarse(log_probs, order[:, :k]), order[:, :k], temperature)
        for k in range(1, vocabulary + 1)
    ]
    torch.testing.assert_close(found[-1], whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[-2], whole, rtol=1e-5, atol=1e-6)  # "all others" is one token
    for fewer, more in pairwise(found):
        assert (fewer <= more + 1e-5).all()
        assert (fewer >= -1e-6).all()
