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
    """Peaks of a made-up model: `base` bytes, `layer` more for each that recomputes not, and never below `floor`."""

    def __init__(self, depth: int, base: int, layer: int, limit: int, floor: int):
        self.peaks = [max(floor, base + (depth - layers) * layer) for layers in range(depth + 1)]
        self.limit = limit
        self.asked: list[int] = []

    def __call__(self, layers: int) -> int:
        self.asked.append(layers)
        if self.peaks[layers] > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.peaks[layers]


@settings(max_examples=500)
@given(
    depth=st.integers(1, 80),
    base=st.integers(0, 10**6),
    layer=st.integers(1, 10**5),
    room=st.integers(0, 8 * 10**6),
    beyond=st.integers(0, 10**6),
    floor=st.integers(0, 2 * 10**6),
)
def test_fewest_that_fit(depth: int, base: int, layer: int, room: int, beyond: int, floor: int) -> None:
    usable = base + room
    memory = Memory(depth, base, layer, usable + beyond, floor)
    if memory.peaks[depth] > memory.limit:
        with pytest.raises(torch.OutOfMemoryError):
            fewest_layers(depth, memory, usable)
        return
    layers = fewest_layers(depth, memory, usable)
    assert layers == next((n for n in range(depth + 1) if memory.peaks[n] <= usable), depth)
    assert layers in memory.asked  # nothing is chosen that was not tried
    assert len(memory.asked) <= 2 + math.ceil(math.log2(depth + 1))


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
