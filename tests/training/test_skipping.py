"""Clipping, and leaving out of steps, inside the optimizer's step."""

import math

import pytest
import torch
from torch import Tensor, nn

from laco_train.settings import OptimizerSettings
from laco_train.training.optim import adamw
from laco_train.training.skipping import SkippedSteps, guard_step


class Two(nn.Module):
    """A matrix and a vector, in two groups of the optimizer."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        values = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(4, 3, generator=values).to(dtype))
        self.vector = nn.Parameter(torch.randn(3, generator=values).to(dtype))


def give(model: nn.Module, *values: float) -> None:
    for parameter, value in zip(model.parameters(), values, strict=True):
        parameter.grad = torch.full_like(parameter, value)


NORM = math.sqrt(12 * 3.0**2 + 3 * 4.0**2)  # of give(model, 3, 4)


@pytest.mark.parametrize(
    ("largest", "scale"), [(None, 1.0), (0.0, 1.0), (1.0, NORM), (NORM / 2, 2.0), (NORM, 1.0), (2 * NORM, 1.0)]
)
def test_norm_and_scale(largest: float | None, scale: float) -> None:
    model = Two()
    give(model, 3, 4)
    optimizer, skipped = adamw(model, OptimizerSettings()), SkippedSteps()
    norm = guard_step(optimizer, largest, skipped)
    assert (norm.dtype, norm.shape) == (torch.float32, ())
    assert float(norm) == pytest.approx(NORM, rel=1e-6)
    assert float(optimizer.grad_scale) == pytest.approx(scale, rel=1e-6)  # type: ignore[attr-defined]
    assert float(optimizer.found_inf) == 0  # type: ignore[attr-defined]
    assert [p.grad.unique().tolist() for p in model.parameters() if p.grad is not None] == [[3.0], [4.0]]
    assert int(skipped.total) == 0  # type: ignore[arg-type]


def test_parameters_without_gradients_count_for_nothing() -> None:
    model = Two()
    model.matrix.grad = torch.full((4, 3), 3.0)
    assert float(guard_step(adamw(model, OptimizerSettings()), None, SkippedSteps())) == pytest.approx(math.sqrt(108))


@pytest.mark.parametrize("largest", [None, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_step_without_finite_gradients_changes_nothing(bad: float, dtype: torch.dtype, largest: float | None) -> None:
    model = Two(dtype)
    optimizer, skipped = adamw(model, OptimizerSettings(learning_rate=0.1)), SkippedSteps()
    give(model, 3, 4)
    guard_step(optimizer, largest, skipped)
    optimizer.step()

    def everything() -> list[Tensor]:
        states = [value for p in model.parameters() for value in optimizer.state[p].values()]
        return [value.detach().clone() for value in (*model.parameters(), *states)]

    before = everything()
    give(model, 3, 4)
    model.vector.grad[1] = bad  # type: ignore[index]
    assert not math.isfinite(guard_step(optimizer, largest, skipped))
    optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(before, everything(), strict=True))
    assert (int(skipped.total), int(skipped.longest)) == (1, 1)  # type: ignore[arg-type]
    give(model, 3, 4)
    guard_step(optimizer, largest, skipped)
    optimizer.step()
    assert not torch.equal(before[0], model.matrix)
    assert int(skipped.total) == 1  # type: ignore[arg-type]


def test_counting_in_a_row() -> None:
    skipped, counts = SkippedSteps(), []
    assert skipped.total is None
    for broken in (False, True, True, False, True, True, True, False, True):
        skipped.count(torch.tensor(broken))
        counts.append((int(skipped.total), int(skipped.longest)))  # type: ignore[arg-type]
    assert counts == [(0, 0), (1, 1), (2, 2), (2, 2), (3, 2), (4, 2), (5, 3), (5, 3), (6, 3)]


def test_steps_equal_those_of_clipping_beforehand() -> None:
    ours, theirs = Two(), Two()
    settings = OptimizerSettings(learning_rate=0.05)
    optimizer, skipped = adamw(ours, settings), SkippedSteps()
    groups = [{"params": [theirs.matrix], "weight_decay": 0.1}, {"params": [theirs.vector], "weight_decay": 0.0}]
    plain = torch.optim.AdamW(groups, lr=0.05, betas=(0.9, 0.95), eps=1e-8)
    values, clipped = torch.Generator().manual_seed(1), 0
    for step in range(20):
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            one.grad = torch.randn(one.shape, generator=values) * 10.0 ** (step % 4 - 2)
            other.grad = one.grad.clone()
        norm = guard_step(optimizer, 1.0, skipped)
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        torch.testing.assert_close(norm, expected)
        clipped += int(expected > 1)
        optimizer.step()
        plain.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert 5 <= clipped <= 15
