"""Distillation without logits gives what the logits give, and is left where it can't."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from laco_train.settings import DistillSettings, LoraSettings
from laco_train.training import fused, layers
from laco_train.training import linear_loss as slices
from laco_train.training.adapters import attach_lora
from laco_train.training.distill import Distillation, DistillLoss, Lesson
from laco_train.training.fused import PLAIN, Kernels
from laco_train.training.fused_distill import DistillStep, FusedDistillation, Trial, hastened
from laco_train.training.linear_loss import Head, linear_distillation
from laco_train.training.loss import Batch, causal_lm_loss
from laco_train.training.teacher import TeacherOnDevice
from tests.cli.conftest import project
from tests.cli.runs import Project

__all__ = ["project"]

Models = Callable[..., LlamaForCausalLM]
FAST = Kernels(attention=False, loss=True, compiled=True)


@pytest.fixture
def sliced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five tokens of the tiny vocabulary at once, so that slices end inside blocks and the last is shorter."""
    monkeypatch.setattr(slices, "ELEMENTS_AT_ONCE", 5 * 320 + 7)


def learned(step: DistillStep, student: nn.Module, batch: Batch) -> tuple[DistillLoss, dict[str, Tensor]]:
    """What a step gives, and the gradients."""
    loss = step(student, batch)
    loss.total.backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    return loss, gradients


@pytest.mark.usefixtures("sliced", "plainly")
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(("mixture", "temperature"), [(0.5, 1.0), (1.0, 1.0), (0.3, 2.5), (0.0, 1.0)])
def test_it_is_distillation_on_logits(
    tiny_llama: Models, batch: Batch, mixture: float, temperature: float, adapted: bool
) -> None:
    settings = DistillSettings(logits=mixture, temperature=temperature)
    teacher = tiny_llama(layers=4).requires_grad_(False)
    base = tiny_llama(layers=2, seed=1)
    student: Any = attach_lora(base, LoraSettings(rank=2)) if adapted else base
    expected, slopes = learned(Distillation(settings, TeacherOnDevice(teacher, (), logits=True)), student, batch)
    found, ours = learned(FusedDistillation(settings, teacher), student, batch)
    for name in ("total", "next_token", "logits", "hidden"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-6)
    assert not found.next_token.requires_grad and float(found.logits) > 0.01
    assert ours.keys() == slopes.keys() and len(ours) > 0
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, slopes[name], rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("compiled", [False, True])
def test_heads_of_other_widths_and_large_logits(compiled: bool) -> None:
    """Against float64 and torch's own functions; the compiled arithmetic is the same."""
    values = torch.Generator().manual_seed(0)
    student = Head(*(5 * torch.randn(n, 16, generator=values) for n in (23, 50)))
    teacher = Head(*(5 * torch.randn(n, 24, generator=values) for n in (23, 50)))
    labels = torch.randint(50, (23,), generator=values)
    labels[::4] = -100
    student.hidden.requires_grad_()
    student.weight.requires_grad_()
    total, parts = linear_distillation(student, teacher, labels, mixture=0.25, temperature=2.0, compiled=compiled)
    found = torch.autograd.grad(3 * total, (student.hidden, student.weight))
    h, w = (x.detach().double().requires_grad_() for x in (student.hidden, student.weight))
    logits, taught = h @ w.t(), teacher.hidden.double() @ teacher.weight.double().t()
    counted = labels != -100
    entropy = nn.functional.cross_entropy(logits, labels)
    apart = 4.0 * nn.functional.kl_div(
        (logits[counted] / 2).log_softmax(-1), (taught[counted] / 2).log_softmax(-1), log_target=True,
        reduction="batchmean",
    )  # fmt: skip
    loss = 0.75 * entropy + 0.25 * apart
    assert float(total.detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert parts.tolist() == pytest.approx([float(entropy.detach()), float(apart.detach())], rel=1e-5)
    for ours, theirs in zip(found, torch.autograd.grad(3 * loss, (h, w)), strict=True):
        assert (ours.double() - theirs).abs().max() <= 1e-5 * float(theirs.abs().max())


def distillation(model: nn.Module, layers: tuple[int, ...] = (), **settings: float) -> Distillation:
    teacher = TeacherOnDevice(model.requires_grad_(False), layers, logits=True)  # type: ignore[arg-type]
    return Distillation(DistillSettings(**{"logits": 0.5, **settings}), teacher)  # type: ignore[arg-type]


def compiled(model: LlamaForCausalLM) -> bool:
    return all(layer._compiled_call_impl is not None for layer in model.model.layers)


def trial(student: nn.Module, batch: Batch, kernels: Kernels = FAST) -> Trial:
    return Trial(student, kernels, batch, contextlib.nullcontext)


@pytest.fixture
def plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arithmetic without torch.compile, which only makes it faster."""
    monkeypatch.setattr(slices, "_compiled", lambda function: function)


@pytest.mark.usefixtures("plainly")
def test_hastened(tiny_llama: Models, batch: Batch) -> None:
    model, student = tiny_llama(layers=2), tiny_llama(layers=2, seed=1)
    tried: list[nn.Module] = []

    def choose(teacher: nn.Module) -> Kernels:
        tried.append(teacher)
        return Kernels(loss=True)

    step, slow = hastened(distillation(model), trial(student, batch), choose)
    assert isinstance(step, FusedDistillation) and step.teacher is model and step.settings.logits == 0.5
    assert tried == [model] and slow == ()
    assert all(p.grad is None for p in student.parameters())


@pytest.mark.parametrize(("student", "teacher"), [(FAST, PLAIN), (PLAIN, Kernels(loss=True, compiled=True))])
def test_both_heads_must_be_plain(tiny_llama: Models, batch: Batch, student: Kernels, teacher: Kernels) -> None:
    slow = distillation(tiny_llama(layers=2))
    teacher = dataclasses.replace(teacher, reasons=("loss: the model does more to its logits",))
    step, why = hastened(slow, trial(tiny_llama(layers=2, seed=1), batch, student), lambda _: teacher)
    assert step is slow and why == ("teacher: loss: the model does more to its logits",)
    assert compiled(slow.teacher.model) == teacher.compiled  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [("other", " would differ by 1.000 nats"), ("nan", " would differ by nan"), ("fails", ": no")],
)
def test_what_differs_or_fails_is_left_out(
    tiny_llama: Models, batch: Batch, wrong: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def arithmetic(logits: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
        if wrong == "fails":
            raise TypeError("no such kernel")
        total, parts, slope = slices.slice_distillation(logits, *others)
        return total + (1 if wrong == "other" else torch.nan), parts, slope

    monkeypatch.setattr(slices, "_compiled", lambda function: arithmetic)
    slow = distillation(tiny_llama(layers=2))
    own = Kernels(loss=True, reasons=("attention: sinks",))
    step, why = hastened(slow, trial(tiny_llama(layers=2, seed=1), batch), lambda _: own)
    assert step is slow
    assert why[0] == "teacher: attention: sinks" and why[1].startswith(f"distillation: loss{said}")


def test_hidden_states_keep_the_layers_as_they_are(tiny_llama: Models, batch: Batch) -> None:
    slow = distillation(tiny_llama(layers=2), (0, 1), hidden=1.0)
    step, (why,) = hastened(slow, trial(tiny_llama(layers=2, seed=1), batch), lambda _: FAST)
    assert step is slow and "hidden states" in why
    assert not compiled(slow.teacher.model)  # type: ignore[attr-defined]


def test_words_on_disk_stay_there(tiny_llama: Models, batch: Batch) -> None:
    slow = Distillation(DistillSettings(logits=0.5), lambda batch: Lesson(None))
    step, (why,) = hastened(slow, trial(tiny_llama(layers=2), batch), lambda _: pytest.fail("there is no model"))
    assert step is slow and "on disk" in why


@pytest.mark.usefixtures("plainly")
def test_layers_that_can_not_be_told_are_left_alone(batch: Batch) -> None:
    def model() -> GPT2LMHeadModel:
        return GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=2))

    teacher = model().eval()
    teacher.config.num_hidden_layers = 3  # what the program finds wrong about a stack
    step, (why,) = hastened(distillation(teacher), trial(model(), batch), lambda _: FAST)
    assert isinstance(step, FusedDistillation) and why.startswith("teacher: layers: ")


@pytest.mark.usefixtures("plainly")
def test_a_fit_learns_and_refines_by_it(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, but for the compilers: the same losses, and no logits of a batch."""
    whole: list[int] = []
    slowly = Distillation.__call__

    def noting(self: Distillation, student: nn.Module, batch: Batch) -> DistillLoss:
        whole.append(len(batch["input_ids"]))
        return slowly(self, student, batch)

    monkeypatch.setattr(Distillation, "__call__", noting)
    monkeypatch.setattr(fused, "_missing", lambda device: "")
    monkeypatch.setattr(layers, "_compiled", lambda call: call)
    options = ["--model.distill.logits", "0.5", "--collapse.refine.tokens", "256", "--collapse.refine.batch_size", "2"]
    run = project.fit(*options)
    assert whole == [1, 1]  # tried on a block, by refinement and by training
    assert "loss without logits, layers" in run.result.out and "with logits" not in run.result.out
    expected = project.fit(*options, "--speed.kernels", "plain")
    assert whole[2:] == [2] * (4 + 6)
    whole.clear()
    project.fit(*options, "--collapse.refine.windows", "1.0")
    assert whole == [1]  # solved alone, refinement needs no divergence
    assert run.validation() == pytest.approx(expected.validation(), rel=1e-5)


def test_a_teacher_is_tried_though_nothing_of_it_trains(tiny_llama: Models, batch: Batch) -> None:
    model = tiny_llama(layers=2)
    expected = causal_lm_loss(model, batch).detach()

    def same(loss: fused.Loss) -> bool:
        return fused.same_loss(model, batch, expected, loss, attention=False, reasons=[])

    def detached(model: nn.Module, batch: Batch) -> Tensor:
        return causal_lm_loss(model, batch).detach()

    assert same(causal_lm_loss) and not same(detached)  # a student needs gradients
    model.requires_grad_(False)
    assert same(causal_lm_loss) and same(detached)
