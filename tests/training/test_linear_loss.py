"""The loss that never stores all logits, against torch's cross-entropy of them in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from laco_train.training import linear_loss as module
from laco_train.training.linear_loss import linear_loss

TOKENS, WIDTH, VOCABULARY = 37, 16, 50


def case(*, without: int = 9, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, head, and labels of which `without` are no target."""
    values = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=values).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=values).to(dtype).requires_grad_()
    labels = torch.randint(VOCABULARY, (TOKENS,), generator=values)
    labels[torch.randperm(TOKENS, generator=values)[:without]] = -100
    return hidden, weight, labels


def expected(hidden: Tensor, weight: Tensor, labels: Tensor, upstream: float = 1.0) -> tuple[Tensor, ...]:
    """Loss and both gradients in float64."""
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    loss = cross_entropy(h @ w.t(), labels)
    return loss.detach(), *torch.autograd.grad(upstream * loss, (h, w))


def found(hidden: Tensor, weight: Tensor, labels: Tensor, upstream: float = 1.0, **options: bool) -> tuple[Tensor, ...]:
    loss = linear_loss(hidden, weight, labels, **{"compiled": False, **options})
    return loss.detach(), *torch.autograd.grad(upstream * loss, (hidden, weight))


def assert_close(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], tolerance: float) -> None:
    for one, other in zip(ours, theirs, strict=True):
        # relative to the largest: a single gradient may be near 0
        assert (one.double() - other).abs().max() <= tolerance * max(float(other.abs().max()), 1e-3)


def test_loss_and_gradients() -> None:
    inputs = case()
    loss, *gradients = found(*inputs)
    assert loss.dtype == torch.float32
    assert [g.shape for g in gradients] == [(TOKENS, WIDTH), (VOCABULARY, WIDTH)]
    assert_close((loss, *gradients), expected(*inputs), 1e-6)


@pytest.mark.parametrize("rows", [1, 5, 36, 37, 100])
def test_slices_make_no_difference(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = case()
    monkeypatch.setattr(module, "ELEMENTS_AT_ONCE", rows * VOCABULARY)
    sizes = []
    plain = module.slice_loss

    def noting(logits: Tensor, labels: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(len(logits))
        return plain(logits, labels, share)

    monkeypatch.setattr(module, "slice_loss", noting)
    assert_close(found(*inputs), expected(*inputs), 1e-6)
    assert (max(sizes), sum(sizes)) == (min(rows, TOKENS), TOKENS)


def test_slice_smaller_than_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ELEMENTS_AT_ONCE", 1)
    assert_close(found(*case()), expected(*case()), 1e-6)


@pytest.mark.parametrize("without", [0, 1, TOKENS - 1])
def test_labels_that_are_no_target_count_for_nothing(without: int) -> None:
    inputs = case(without=without)
    ours = found(*inputs)
    assert_close(ours, expected(*inputs), 1e-6)
    assert not ours[1][inputs[2] == -100].any()


def test_no_target_at_all() -> None:
    loss, *gradients = found(*case(without=TOKENS))
    assert float(loss) == 0
    assert all(not gradient.any() for gradient in gradients)


def test_large_logits_do_not_overflow() -> None:
    hidden, weight, labels = case()
    inputs = (100 * hidden.detach()).requires_grad_(), weight, labels
    assert_close(found(*inputs), expected(*inputs), 1e-4)  # float32 knows a logit of 1,000 to 3e-5


@pytest.mark.parametrize("upstream", [0.25, -3.0])
def test_upstream_gradient_scales(upstream: float) -> None:
    assert_close(found(*case(), upstream), expected(*case(), upstream), 1e-6)


@pytest.mark.parametrize("frozen", ["head", "states"])
def test_gradient_that_nobody_asked_for_is_not_made(frozen: str) -> None:
    hidden, weight, labels = case()
    _, d_hidden, d_weight = expected(hidden, weight, labels)
    still, moving, gradient = (weight, hidden, d_hidden) if frozen == "head" else (hidden, weight, d_weight)
    still.requires_grad_(False)
    loss: Any = linear_loss(hidden, weight, labels, compiled=False)
    made = [gradient is not None for gradient in loss.grad_fn.saved_tensors]
    assert made == [frozen == "head", frozen == "states"]
    loss.backward()
    assert still.grad is None
    assert moving.grad is not None
    assert_close((moving.grad,), (gradient,), 1e-6)


def test_nothing_asked() -> None:
    with torch.no_grad():
        loss = float(linear_loss(*case(), compiled=False))
    assert loss == pytest.approx(float(expected(*case())[0]), rel=1e-6)


def test_bfloat16() -> None:
    inputs = case(dtype=torch.bfloat16)
    loss, d_hidden, d_weight = found(*inputs)
    assert (loss.dtype, d_hidden.dtype, d_weight.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    assert_close((loss, d_hidden, d_weight), expected(*inputs), 2**-6)


def test_head_in_float32_under_narrower_states() -> None:
    hidden, weight, labels = case()
    inputs = hidden.detach().bfloat16().requires_grad_(), weight, labels
    loss, d_hidden, d_weight = found(*inputs)
    assert (d_hidden.dtype, d_weight.dtype) == (torch.bfloat16, torch.float32)
    assert_close((loss, d_hidden, d_weight), expected(*inputs), 2**-6)


def test_compiled() -> None:
    assert_close(found(*case(), compiled=True), expected(*case()), 1e-6)
