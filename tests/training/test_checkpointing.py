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


@settings(max_examples=500)
@given(
    depth=st.integers(1, 80),
    state=st.integers(0, 10**6),
    layer=st.integers(1, 10**5),
    loss=st.integers(0, 10**6),
    share=st.floats(0, 1.2),
)
def test_fewest_that_fit(depth: int, state: int, layer: int, loss: int, share: float) -> None:
    """A made-up model: its peak lies in the loss, or in the backward pass through a layer that recomputes."""

    def peak(recompute: int) -> int:
        kept = state + (depth - recompute) * layer
        return max(kept + loss, kept + layer if recompute else 0)

    usable = int(state + share * (depth * layer + loss))
    layers = fewest_layers(depth, peak(depth), layer, usable)
    least = next((n for n in range(depth + 1) if peak(n) <= usable), depth)
    assert least <= layers <= least + 1  # on the safe side, by the layer that a pass recomputes at most
    if peak(depth) <= usable:
        assert peak(layers) <= usable


def test_layer_that_holds_nothing_keeps_it() -> None:
    assert fewest_layers(4, 10, 0, 100) == 0


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
