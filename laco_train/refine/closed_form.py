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
from laco_train.errors import InputError
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

    Raises:
        InputError: a solution that is not finite.
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
    while sums:  # each is as large as its matrix squared
        sums.popitem()[1].solve()
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
            except torch.OutOfMemoryError:
                raise
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
    hook = projection.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else next(iter(kwargs.values()))), with_kwargs=True
    )
    try:
        yield seen
    finally:
        hook.remove()


class _Sums:
    """Normal equations of the change of one projection, over the tokens so far; float32, solved in float64."""

    def __init__(self, projection: nn.Module):
        self.projection: Any = projection
        weight: Any = self.projection.weight
        features = _features(projection)
        self._squares = torch.zeros(features, features, device=weight.device)
        self._products = torch.zeros(features, weight.numel() // features, device=weight.device)  # (F, D)

    def add(self, features: Tensor, reached: Tensor, target: Tensor) -> None:
        """A batch: (..., F) features, and the (..., D) states that the layer reaches and should reach."""
        a, here, aim = (rows.reshape(-1, rows.shape[-1]).float() for rows in (features, reached, target))
        weighted = (a / (aim.square().sum(-1, keepdim=True) + EPSILON)).T
        self._squares.addmm_(weighted, a)
        self._products.addmm_(weighted, aim - here)

    def solve(self) -> None:
        """Change the projection; a bias stays.

        Raises:
            InputError: the solution is not finite.
        """
        squares = self._squares.double()
        squares.diagonal().add_(RIDGE * squares.diagonal().mean())
        change, _ = torch.linalg.solve_ex(squares, self._products.double())
        if not bool(torch.isfinite(change).all()):
            raise InputError("collapse.refine.windows", "the least-squares solution is not finite; set it to 0")
        weight = self.projection.weight
        weight += (change if isinstance(self.projection, Conv1D) else change.T).to(weight.dtype)
