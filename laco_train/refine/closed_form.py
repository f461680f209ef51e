"""Windows in closed form: a layer's last projection by weighted least squares (issue 8, Refinement).

What a layer adds at its end is linear in one matrix, the down projection of its MLP, if nothing but a sum comes after
it. With what enters that matrix held fixed, the best one for a window has a solution: no steps, no learning rate, and
only forward passes of the original.
Shapes: N tokens, F features that enter the projection, D hidden size.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from laco_train.collapse import decoder_of
from laco_train.collapse.similarity import hidden_of
from laco_train.refine.place import Place
from laco_train.refine.windows import Window, recorded
from laco_train.training.distill import EPSILON
from laco_train.training.loss import Batch, model_inputs

# Share of the mean squared feature that is added to the diagonal: keeps the matrix near the one it was.
RIDGE = 1e-2
_TOLERANCE = 0.05  # half precision rounds the sum of what was added


@torch.no_grad()
def solve_windows(
    original: PreTrainedModel,
    collapsed: PreTrainedModel,
    windows: Sequence[Window],
    batches: Iterator[Batch],
    place: Place,
    deadline: float | None = None,
) -> int:
    """Let each window's layer come as near to what its window does to the original's states as its last projection can.

    The error is squared, relative to the square of the state that should be reached, as in `hidden_error`. All windows
    share the passes of the original. A layer with more than a sum after its projections stays as it is.

    Args:
        batches: at least one is read.
        deadline: of time.perf_counter; no batch is begun after it.

    Returns:
        The number of batches read; 0 if there is nothing to solve.
    """
    stack = decoder_of(collapsed).stack
    sums: dict[Window, _Sums] = {}
    done = 0
    for batch in batches:
        if done and deadline is not None and time.perf_counter() > deadline:
            break
        on_device = {name: rows.to(place.device) for name, rows in batch.items()}
        with place.context(), recorded(original, windows) as (entering, leaving):
            original.base_model(**model_inputs(original, on_device))
        if not done:
            found = {w: last_projection(stack[w.layer], *entering[w.first], place) for w in windows}
            sums = {window: _Sums(projection) for window, projection in found.items() if projection is not None}
            if not sums:
                return 0
        for window, total in sums.items():
            with place.context(), _entering(total.projection) as features:
                args, kwargs = entering[window.first]
                # not the layer itself, which may be compiled: hooks in it would not be called
                reached = hidden_of(stack[window.layer].forward(*args, **kwargs))
            total.add(features[0], reached, leaving[window.last])
        done += 1
    for total in sums.values():
        total.solve()
    return done


def last_projection(layer: nn.Module, args: Any, kwargs: Any, place: Place) -> nn.Module | None:
    """The widest linear map of `layer` whose output is added to the layer's own and to nothing else; found by trying.

    Args:
        args, kwargs: of a call of the layer.
    """

    @torch.no_grad()
    def output(changed: nn.Module | None, by: Tensor) -> Tensor:
        hooks = []
        if changed is not None:
            hooks.append(changed.register_forward_hook(lambda module, given, out: out + by.reshape(out.shape)))
        try:
            with place.context():
                return hidden_of(layer.forward(*args, **kwargs)).float()
        finally:
            for hook in hooks:
                hook.remove()

    plain = output(None, torch.empty(0))
    generator = torch.Generator(plain.device).manual_seed(0)
    noise = torch.randn(plain.shape, device=plain.device, generator=generator) * plain.std(-1, keepdim=True)
    width = plain.shape[-1]
    maps = [module for module in layer.modules() if isinstance(module, nn.Linear | Conv1D)]
    for module in sorted(maps, key=_features, reverse=True):
        if module.weight.numel() == width * _features(module):
            try:
                change = output(module, noise) - plain
            except RuntimeError:  # fewer tokens than the layer's: an expert's
                continue
            if float((change - noise).norm()) < _TOLERANCE * float(noise.norm()):
                return module
    return None


def _features(module: nn.Module) -> int:
    """F of a linear map."""
    weight: Any = module.weight
    return int(weight.shape[0] if isinstance(module, Conv1D) else weight.shape[1])


@contextmanager
def _entering(projection: nn.Module) -> Iterator[list[Tensor]]:
    """What enters `projection` in the calls to come."""
    seen: list[Tensor] = []
    hook = projection.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        yield seen
    finally:
        hook.remove()


class _Sums:
    """Normal equations of the change of one projection, over the tokens so far; float32, solved in float64."""

    def __init__(self, projection: nn.Module):
        self.projection: Any = projection
        self._squares: Tensor | float = 0.0  # (F, F)
        self._products: Tensor | float = 0.0  # (F, D)

    def add(self, features: Tensor, reached: Tensor, target: Tensor) -> None:
        """A batch: (B, T, F) features, and the (B, T, D) states that the layer reaches and should reach."""
        a, aim = features.flatten(0, 1).float(), target.flatten(0, 1).float()
        weights = 1 / (aim.square().sum(-1, keepdim=True) + EPSILON)
        missing = aim - reached.flatten(0, 1).float()
        weighted = (a * weights).T
        self._squares = self._squares + weighted @ a
        self._products = self._products + weighted @ missing

    def solve(self) -> None:
        """Change the projection; a bias stays."""
        assert isinstance(self._squares, Tensor) and isinstance(self._products, Tensor)
        squares, products = self._squares.double(), self._products.double()
        squares.diagonal().add_(RIDGE * squares.diagonal().mean())
        change = torch.linalg.solve(squares, products)
        weight = self.projection.weight
        weight += (change if isinstance(self.projection, Conv1D) else change.T).to(weight.dtype)
