"""AdamW for bfloat16 weights: no small update is lost, and a resumed optimizer goes on to the bit."""

import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from laco_train.training.bf16_adamw import BF16AdamW, joined, random_bits, rounded, split
from tests.oracles.adamw import Hyper, adamw_step

SPACING = 2.0**-7  # of bfloat16 between 1 and 2
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True)
EDGES = [0.0, -0.0, 1e-45, -1e-45, 1.1754942e-38, -1.1754944e-38, 3.4028235e38, -3.4028235e38, 3.39e38, 1 + 2**-8]


def weights_of(count: int, low: float = 1.1, high: float = 1.9) -> Tensor:
    return torch.linspace(low, high, count).bfloat16()


def run(optimizer: torch.optim.Optimizer, weight: nn.Parameter, gradients: list[Tensor]) -> None:
    for gradient in gradients:
        weight.grad = gradient.to(weight.dtype)
        optimizer.step()


# A thousand updates of 1e-6 each, on weights between 1 and 2: each is 1/4000 of half a bfloat16's spacing.
STEPS, LR, COUNT = 1000, 1e-6, 16384
MOVED = STEPS * LR
SMALL: dict[str, Any] = {"lr": LR, "betas": (0.9, 0.95), "weight_decay": 0.1}


@pytest.fixture(scope="module")
def gradients() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    # of one sign, so that the weight moves by about the learning rate each step
    return [(1 + 0.1 * torch.randn(COUNT, generator=generator)).bfloat16() for _ in range(STEPS)]


@pytest.fixture(scope="module")
def in_float32(gradients: list[Tensor]) -> Tensor:
    weight = nn.Parameter(weights_of(COUNT).float())
    run(torch.optim.AdamW([weight], **SMALL), weight, gradients)
    moved = (weights_of(COUNT).float() - weight.detach()).mean().item()
    assert moved == pytest.approx(MOVED, rel=0.2)
    return weight.detach()


def test_plain_bfloat16_loses_small_updates(gradients: list[Tensor]) -> None:
    weight = nn.Parameter(weights_of(COUNT))
    run(torch.optim.AdamW([weight], **SMALL), weight, gradients[:200])
    assert torch.equal(weight, weights_of(COUNT))


def test_stochastic_rounding_follows_float32_in_the_mean(gradients: list[Tensor], in_float32: Tensor) -> None:
    weight = nn.Parameter(weights_of(COUNT))
    run(BF16AdamW([weight], **SMALL, exact=False), weight, gradients)
    error = weight.detach().double() - in_float32.double()
    # an update u is rounded by a draw of variance below u * spacing, and draws add up over the way moved
    deviation = math.sqrt(1.2 * MOVED * SPACING)
    bound = 5 * deviation / math.sqrt(COUNT)
    assert abs(error.mean()) < bound
    assert bound < 0.15 * MOVED  # so lost updates would show
    assert error.std() < 1.2 * deviation


def test_exact_follows_float32(gradients: list[Tensor], in_float32: Tensor) -> None:
    weight = nn.Parameter(weights_of(COUNT))
    optimizer = BF16AdamW([weight], **SMALL, exact=True)
    run(optimizer, weight, gradients)
    kept = joined(weight.detach(), optimizer.state[weight]["low"].view(torch.int16))
    # float32 rounds each of a thousand subtractions; the moments' rounding moves an update by a hundredth at most
    rounding = 5 * math.sqrt(2 * STEPS) * 2**-24 * 2
    torch.testing.assert_close(kept, in_float32, rtol=0, atol=rounding + 0.002 * MOVED)
    assert torch.equal(weight, kept.bfloat16())


def test_exact_is_float32_itself_where_moments_round_nothing() -> None:
    gradients = [torch.full((256,), 2.0 ** (i % 3) * (-1) ** (i // 5)) for i in range(STEPS)]
    kept, reference = nn.Parameter(weights_of(256)), nn.Parameter(weights_of(256).float())
    optimizer = BF16AdamW([kept], lr=LR, betas=(0.0, 0.0), weight_decay=0.0, exact=True)
    run(optimizer, kept, gradients)
    run(torch.optim.AdamW([reference], lr=LR, betas=(0.0, 0.0), weight_decay=0.0), reference, gradients)
    low = optimizer.state[kept]["low"].view(torch.int16)
    torch.testing.assert_close(joined(kept.detach(), low), reference.detach(), rtol=0, atol=2**-22)


def doubles(tensor: Tensor) -> np.ndarray:
    return tensor.double().numpy().copy()


@settings(deadline=None, max_examples=40)
@given(
    hyper=st.builds(
        Hyper,
        lr=st.floats(1e-6, 0.1),
        beta1=st.floats(0, 0.99),
        beta2=st.floats(0.5, 0.999),
        eps=st.floats(1e-8, 1e-3),
        weight_decay=st.floats(0, 1),
    ),
    scale=st.floats(0.5, 100),
    seed=st.integers(0, 1000),
)
def test_each_step_is_that_of_the_oracle(hyper: Hyper, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = nn.Parameter(torch.randn(5, 7, generator=generator).bfloat16())
    optimizer = BF16AdamW([weight], hyper.lr, (hyper.beta1, hyper.beta2), hyper.eps, hyper.weight_decay, exact=True)
    optimizer.grad_scale = torch.tensor(scale)
    low, mean, square = torch.zeros(5, 7, dtype=torch.int16), torch.zeros(5, 7), torch.zeros(5, 7)
    for step in range(1, 5):
        weight.grad = torch.randn(5, 7, generator=generator).bfloat16()
        before = doubles(joined(weight.detach(), low))
        gradient = doubles(weight.grad) / float(torch.tensor(scale))
        expected = adamw_step(before, gradient, doubles(mean), doubles(square), step, hyper)
        optimizer.step()
        state = optimizer.state[weight]
        low, mean, square = (
            state["low"].view(torch.int16).clone(),
            state["exp_avg"].clone(),
            state["exp_avg_sq"].clone(),
        )
        assert float(state["step"]) == step
        # 1 - beta ** step in float32 has an error of 2^-24 beside what may be a thousandth
        atol = 1e-4 * max(np.abs(expected[0] - before).max(), hyper.lr)
        np.testing.assert_allclose(doubles(joined(weight.detach(), low)), expected[0], rtol=1e-6, atol=atol)
        for stored, exact in ((mean, expected[1]), (square, expected[2])):
            # a neighbour of the exact value: less than one spacing, 2^-7 of it at most, away
            assert np.all(np.abs(doubles(stored) - exact) <= np.abs(exact) * (2**-7 + 1e-5) + 1e-30)


def bits_of(values: Tensor) -> Tensor:
    return values.view(torch.int32)


@settings(max_examples=200)
@given(st.lists(FLOATS, min_size=1, max_size=50))
def test_split_loses_no_bit(values: list[float]) -> None:
    weight = torch.tensor([*values, *EDGES])
    high, low = split(weight)
    assert (high.dtype, low.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(bits_of(joined(high, low)), bits_of(weight))
    error = (high.double() - weight.double()).abs()
    finite = torch.isfinite(high)
    nearest = (weight.bfloat16().double() - weight.double()).abs()
    assert torch.equal(error[finite], nearest[finite])  # ties go away from 0 here, to even there


def neighbours(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 towards 0 from each value (itself, if it is one), and the next one away from 0."""
    inner = bits_of(weight) & ~0xFFFF
    dropped = (bits_of(weight) & 0xFFFF) != 0
    outer = torch.where(dropped, inner + 0x10000, inner)
    return inner.view(torch.float32).bfloat16(), outer.view(torch.float32).bfloat16()


@settings(max_examples=200)
@given(st.lists(FLOATS, min_size=1, max_size=50), st.integers(0, 2**32 - 1))
def test_rounding_gives_a_neighbour(values: list[float], noise: int) -> None:
    weight = torch.tensor([*values, *EDGES])
    result = rounded(weight, torch.full((len(weight),), noise))
    inner, outer = neighbours(weight)
    assert bool(((result == inner) | (result == outer)).all())
    assert torch.equal(torch.signbit(result), torch.signbit(weight))


@given(FLOATS, FLOATS, st.integers(0, 0xFFFF))
def test_rounding_is_monotone(one: float, other: float, noise: int) -> None:
    low, high = sorted((one, other))
    # noise rounds away from 0, so that a negative value of the same noise goes down
    same_sign = math.copysign(1, low) == math.copysign(1, high)
    first, second = rounded(torch.tensor([low, high]), torch.full((2,), noise))
    assert first <= second or not same_sign


@settings(max_examples=20, deadline=None)
@given(st.floats(2**-120, 2**120, width=32), st.booleans())
def test_rounding_is_right_in_the_mean(value: float, negative: bool) -> None:
    weight = torch.tensor(-value if negative else value).expand(2**16).contiguous()
    # every noise once: the mean is the value itself, not only close to it
    mean = rounded(weight, torch.arange(2**16)).double().mean().item()
    assert mean == pytest.approx(weight[0].item(), rel=1e-12)


@pytest.mark.parametrize("noise", [0, 1, 0x8000, 0xFFFF])
def test_what_is_not_finite_stays_so(noise: int) -> None:
    # the last two are NaNs as GPUs make them, one rounding step from a carry into the sign
    bits = [0x7F800000, -0x800000, 0x7FC00000, -0x400000, 0x7F800001, 0x7FFFFFFF, -1]
    values = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    for result in (rounded(values, torch.full((len(bits),), noise)), split(values)[0], joined(*split(values))):
        assert not torch.isfinite(result).any()
    assert torch.equal(rounded(values[:2], torch.full((2,), noise)).float(), values[:2])


def snapshot(weight: nn.Parameter, optimizer: BF16AdamW) -> list[Tensor]:
    return [weight.detach().clone(), *(value.clone() for value in optimizer.state[weight].values())]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(
            one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
        )  # bits: NaN equals itself


@pytest.mark.parametrize("exact", [True, False])
def test_scale_divides_gradients(exact: bool) -> None:
    gradient = torch.randn(64).bfloat16()
    found = []
    for factor in (1, 8):
        weight = nn.Parameter(weights_of(64))
        optimizer = BF16AdamW([weight], lr=0.1, eps=1.0, exact=exact)  # a large eps, else Adam forgets the scale
        optimizer.grad_scale = torch.tensor(float(factor))
        run(optimizer, weight, [factor * gradient] * 3)
        found.append(snapshot(weight, optimizer))
        assert torch.equal(weight.grad, factor * gradient)  # itself it is left alone
    assert_same(*found)
    assert not torch.equal(found[0][0], weights_of(64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("exact", [True, False])
def test_step_is_left_out_where_gradients_are_not_finite(exact: bool, dtype: torch.dtype) -> None:
    weight = nn.Parameter(weights_of(64).to(dtype))
    optimizer = BF16AdamW([weight], lr=0.1, weight_decay=0.5, exact=exact)
    run(optimizer, weight, [torch.randn(64)] * 2)
    before = snapshot(weight, optimizer)
    for bad in (math.nan, math.inf):
        optimizer.found_inf = torch.tensor(1.0)
        run(optimizer, weight, [torch.full((64,), bad)])
        assert_same(before, snapshot(weight, optimizer))
    optimizer.found_inf = torch.tensor(0.0)
    run(optimizer, weight, [torch.ones(64)])
    assert not torch.equal(before[0], weight)
    assert float(optimizer.state[weight]["step"]) == 3


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)  # as Lightning does


@pytest.mark.parametrize("exact", [True, False])
def test_optimizer_that_was_saved_goes_on_to_the_bit(exact: bool) -> None:
    gradients = [torch.randn(4, 64) for _ in range(6)]
    whole, both = [nn.Parameter(weights_of(256).view(4, 64)) for _ in range(2)], {"lr": 1e-4, "weight_decay": 0.1}
    optimizer = BF16AdamW([whole[0]], **both, exact=exact)
    run(optimizer, whole[0], gradients[:3])
    if exact:
        low = optimizer.state[whole[0]]["low"].view(torch.int16)
        low.view(-1)[:4] = torch.tensor([0x7FC1, 0x7F81, -63, -0x7F], dtype=torch.int16)  # NaNs, were they bfloat16
        assert torch.isnan(optimizer.state[whole[0]]["low"]).sum() >= 3
    state = through_a_file({"optimizer": optimizer.state_dict(), "weight": whole[0].detach()})
    resumed = nn.Parameter(state["weight"])
    fresh = BF16AdamW([resumed], **both, exact=exact)
    fresh.load_state_dict(state["optimizer"])
    assert_same(snapshot(whole[0], optimizer), snapshot(resumed, fresh))
    assert ("low" in fresh.state[resumed]) is exact
    run(optimizer, whole[0], gradients[3:])
    run(fresh, resumed, gradients[3:])
    assert_same(snapshot(whole[0], optimizer), snapshot(resumed, fresh))


def test_float32_parameters_are_updated_as_by_torch() -> None:
    norm, matrix = nn.Parameter(torch.rand(32) + 0.5), nn.Parameter(weights_of(64))
    reference = nn.Parameter(norm.detach().clone())
    common = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8}
    ours = BF16AdamW(
        [{"params": [matrix], "weight_decay": 0.1}, {"params": [norm], "weight_decay": 0.3}], **common, exact=True
    )
    theirs = torch.optim.AdamW([reference], weight_decay=0.3, **common)
    for _ in range(50):
        norm.grad, matrix.grad = torch.randn(32), torch.randn(64).bfloat16()
        reference.grad = norm.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(norm.detach(), reference.detach(), rtol=1e-6, atol=1e-6)
    assert set(ours.state[norm]) == {"step", "exp_avg", "exp_avg_sq"}
    assert ours.state[norm]["exp_avg"].dtype == torch.float32
    assert set(ours.state[matrix]) == {"step", "exp_avg", "exp_avg_sq", "low"}


def noise_of(step: int, salt: int, count: int = 2**16) -> Tensor:
    return random_bits(count, torch.tensor(float(step)), salt, torch.device("cpu"))


def test_noise_is_a_function_of_step_parameter_and_element() -> None:
    torch.manual_seed(1)
    first = noise_of(7, 3)
    torch.manual_seed(2)
    assert torch.equal(first, noise_of(7, 3))
    assert torch.equal(first[:1000], noise_of(7, 3, 1000))
    cpu = torch.device("cpu")
    assert torch.equal(first[1000:1500], random_bits(500, torch.tensor(7.0), 3, cpu, start=1000))
    for other in (noise_of(8, 3), noise_of(7, 4)):
        assert (first == other).float().mean() < 0.001
    assert first.min() >= 0 and first.max() < 2**32


@pytest.mark.parametrize(("step", "salt"), [(1, 0), (2, 0), (1, 1), (100_000, 500)])
def test_noise_is_balanced(step: int, salt: int) -> None:
    noise, count = noise_of(step, salt), 2**16
    bits = torch.stack([(noise >> i) & 1 for i in range(32)]).double()
    six_deviations = 6 * 0.5 / math.sqrt(count)
    assert (bits.mean(1) - 0.5).abs().max() < six_deviations
    assert (torch.corrcoef(bits) - torch.eye(32)).abs().max() < 6 / math.sqrt(count)
    for other in (noise_of(step + 1, salt), noise_of(step, salt + 1), noise.roll(1)):  # of another time, place, element
        moved = torch.stack([(other >> i) & 1 for i in range(32)]).double()
        assert ((bits == moved).double().mean(1) - 0.5).abs().max() < six_deviations


def rounded_with(seed: int, steps: int = 3) -> Tensor:
    weight = nn.Parameter(weights_of(4096))
    run(BF16AdamW([weight], lr=1e-3, exact=False, seed=seed), weight, [torch.ones(4096)] * steps)
    return weight.detach()


@given(st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1))
@settings(max_examples=20, deadline=None)
def test_each_seed_rounds_in_its_own_way(one: int, other: int) -> None:
    assert torch.equal(rounded_with(one), rounded_with(one))
    assert torch.equal(rounded_with(one), rounded_with(other)) == (one == other)


def test_a_saved_optimizer_keeps_its_seed() -> None:
    weight = nn.Parameter(weights_of(64))
    saved = BF16AdamW([weight], lr=1e-3, exact=False, seed=3)
    other = BF16AdamW([weight], lr=1e-3, exact=False, seed=4)
    other.load_state_dict(through_a_file(saved.state_dict()))
    assert other.param_groups[0]["seed"] == 3


def test_same_weights_round_differently_in_each_parameter() -> None:
    weights = [nn.Parameter(weights_of(4096)) for _ in range(2)]
    optimizer = BF16AdamW(weights, lr=1e-3, exact=False)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert not torch.equal(*weights)


def test_empty_share_of_a_sharded_parameter() -> None:
    weights = [nn.Parameter(torch.zeros(0, 4).bfloat16()), nn.Parameter(weights_of(4))]
    optimizer = BF16AdamW(weights, lr=0.1, exact=True)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert not torch.equal(weights[1], weights_of(4))
