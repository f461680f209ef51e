"""How many layers recompute their activations."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from laco_train.training.checkpointing import fewest_layers, optimizer_bytes
from tests.cli.conftest import project
from tests.cli.runs import Project

__all__ = ["project"]


class Memory:
    """Peaks of a made-up model: `base` bytes, and `layer` more for each that recomputes not, within a share `noise`."""

    def __init__(self, depth: int, base: int, layer: int, limit: int, noise: float, seed: int):
        draws = torch.rand(depth + 1, generator=torch.Generator().manual_seed(seed)).tolist()
        self.peaks = [int(base + (depth - layers) * layer + noise * layer * draw) for layers, draw in enumerate(draws)]
        self.limit = limit
        self.asked: list[int] = []

    def __call__(self, layers: int) -> int:
        self.asked.append(layers)
        if self.peaks[layers] > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.peaks[layers]


MODELS = {
    "depth": st.integers(1, 80),
    "base": st.integers(0, 10**6),
    "layer": st.integers(1, 10**5),
    "room": st.integers(0, 8 * 10**6),
    "beyond": st.integers(0, 10**6),
    "seed": st.integers(0, 100),
}


@settings(max_examples=500)
@given(**MODELS, noise=st.sampled_from([0.0, 0.1, 0.9]))
def test_never_above_what_is_usable_if_that_can_be(
    depth: int, base: int, layer: int, room: int, beyond: int, seed: int, noise: float
) -> None:
    usable = base + room
    memory = Memory(depth, base, layer, usable + beyond, noise, seed)
    if memory.peaks[depth] > memory.limit:
        with pytest.raises(torch.OutOfMemoryError):
            fewest_layers(depth, memory, usable)
        return
    layers = fewest_layers(depth, memory, usable)
    assert 0 <= layers <= depth
    assert memory.peaks[layers] <= usable or layers == depth
    assert layers in memory.asked  # nothing is chosen that was not tried
    assert len(memory.asked) <= 5


@settings(max_examples=500)
@given(**MODELS)
def test_fewest_where_memory_is_a_straight_line(
    depth: int, base: int, layer: int, room: int, beyond: int, seed: int
) -> None:
    usable = base + room
    memory = Memory(depth, base, layer, usable + beyond, 0.0, seed)
    best = next((n for n in range(depth + 1) if memory.peaks[n] <= usable), depth)
    layers = fewest_layers(depth, memory, usable)
    # where two more layers don't fit, only that is known of the line
    assert best <= layers <= best + (2 if depth - best < 2 else 0)


def test_more_layers_after_a_try_that_failed() -> None:
    # a line through the last two measurements promises too much here
    asked: list[int] = []

    def peak_of(layers: int) -> int:
        asked.append(layers)
        return 10_000 - 100 * layers + (2_000 if layers <= 13 else 0)

    assert fewest_layers(20, peak_of, 9_000) == 14
    assert asked == [20, 18, 10, 12, 14]


@pytest.mark.parametrize(
    ("dtype", "eight_bit", "exact", "each"),
    [
        (torch.bfloat16, False, False, 4),
        (torch.bfloat16, False, True, 6),
        (torch.float32, False, True, 8),
        (torch.bfloat16, True, False, 2.1),
    ],
)
def test_bytes_of_the_optimizer(dtype: torch.dtype, eight_bit: bool, exact: bool, each: float) -> None:
    model = nn.Sequential(nn.Linear(10, 10, bias=False, dtype=dtype), nn.Linear(10, 10, bias=False, dtype=dtype))
    model[1].requires_grad_(False)
    assert optimizer_bytes(model, eight_bit=eight_bit, exact=exact) == math.floor(100 * each)


def test_run_that_recomputes_ends_the_same(project: Project) -> None:
    plain = project.fit("--speed.checkpointing", "none")
    again = project.fit("--speed.checkpointing", "all")
    (ours,), (theirs,) = (list((run.folder / "checkpoints").glob("*.ckpt")) for run in (again, plain))
    weights, expected = (torch.load(path, weights_only=True)["state_dict"] for path in (ours, theirs))
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    assert again.validation() == pytest.approx(plain.validation(), rel=1e-5)
    depth = again.summary()["depth"]
    assert (plain.summary()["checkpointed_layers"], again.summary()["checkpointed_layers"]) == (0, depth)
