"""A refinement from first to last, and the plan that holds what came of it."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from laco_train.collapse import CollapsePlan
from laco_train.collapse.plan import Refined, Refinement
from laco_train.errors import InputError
from laco_train.precision import refuse_float16
from laco_train.refine.closed_form import solve_windows
from laco_train.refine.place import Place
from laco_train.refine.windows import windows_of
from laco_train.settings import DistillSettings, OptimizerSettings, RefineSettings, ScheduleSettings
from laco_train.training.distill import Distillation
from laco_train.training.loss import Batch
from laco_train.training.optim import adamw, warmup_cosine
from laco_train.training.skipping import SkippedSteps, guard_step
from laco_train.training.teacher import TeacherOnDevice

_WARMUP = 0.05  # of the steps
_LARGEST_NORM = 1.0


@torch.enable_grad()
def refine(
    original: PreTrainedModel,
    collapsed: PreTrainedModel,
    plan: CollapsePlan,
    batches: Sequence[Batch],
    settings: RefineSettings,
    place: Place,
) -> CollapsePlan:
    """Fit `collapsed` to `original`, in place: each window alone in closed form, then all together to its distribution.

    Nothing is drawn at random: the same batches on the same device give the same weights.

    Args:
        original: the plan's source, on `place.device`, in eval mode; it stays as it is.
        collapsed: what the plan made of it, on that device; left in eval mode.
        batches: taken in order and again from the first once they end; each holds as many tokens.
        settings: tokens are rounded down to whole batches, one a step.

    Returns:
        The plan with the weights reached, and with the tokens and seconds that they took, added to those of a layer
        that the strategy fitted, and of refinement apart, added to those of one before.

    Raises:
        InputError: fewer tokens than a batch has, weights of float16 that would descend, or a loss that is not finite.
    """
    if settings.windows < 1:  # before windows are solved
        refuse_float16(p.dtype for p in collapsed.parameters())
    each = batches[0]["input_ids"].numel()
    steps = settings.tokens // each
    if steps < 1:
        raise InputError("collapse.refine.tokens", f"is {settings.tokens}, less than the {each} of one batch; raise it")
    windows = windows_of(plan)
    supply = itertools.cycle(batches)
    began = time.perf_counter()
    deadline = None if settings.seconds is None else began + settings.seconds
    done = 0
    if windows and (alone := round(settings.windows * steps)):
        collapsed.eval()  # dropout is no part of what is solved
        done = solve_windows(original, collapsed, windows, itertools.islice(supply, alone), place, deadline)
        if not done:
            print("No layer that stands for others ends in a sum: none is solved alone.", flush=True)
    step = by_logits(original) if place.divergence is None else place.divergence
    collapsed.train()
    late = deadline is not None and time.perf_counter() > deadline
    left = 0 if done and late else steps - done
    rest, rate = itertools.islice(supply, left), settings.learning_rate
    done += _descend(collapsed, lambda batch: step(collapsed, batch).total, rest, left, rate, place, deadline)
    collapsed.eval()
    if place.device.type == "cuda":
        torch.cuda.synchronize(place.device)
    seconds = time.perf_counter() - began
    content = safetensors.torch.save(
        {name: p.detach().to("cpu", copy=True).contiguous() for name, p in collapsed.named_parameters()}
    )
    before, fitted = plan.refinement, plan.refined
    taken = Refinement(before.tokens + done * each, before.seconds + seconds)
    tokens = done * each + (0 if fitted is None else fitted.tokens)
    seconds += 0.0 if fitted is None else fitted.seconds
    return dataclasses.replace(plan, refined=Refined.of(content, tokens, seconds, taken), refined_weights=content)


def by_logits(original: PreTrainedModel) -> Distillation:
    """The divergence from `original` alone, of a student on a batch; logits of both are stored."""
    return Distillation(DistillSettings(logits=1.0), TeacherOnDevice(original, (), logits=True))


def _descend(
    trained: nn.Module,
    loss: Callable[[Batch], Tensor],
    batches: Iterator[Batch],
    steps: int,
    learning_rate: float,
    place: Place,
    deadline: float | None,
) -> int:
    """AdamW steps on `trained`, one a batch, until they end or the deadline has passed; returns how many.

    Raises:
        InputError: the last loss was not finite, or too many gradients in a row, whose steps are left out.
    """
    if steps == 0:
        return 0
    settings = OptimizerSettings(learning_rate=learning_rate)
    optimizer = adamw(trained, settings)
    schedule = warmup_cosine(optimizer, ScheduleSettings(warmup_steps=max(1, round(_WARMUP * steps))), steps)
    skipped = SkippedSteps()
    done = 0
    for batch in batches:
        if deadline is not None and done and time.perf_counter() > deadline:
            break
        with place.context():
            value = loss({name: rows.to(place.device) for name, rows in batch.items()})
        value.backward()
        guard_step(optimizer, _LARGEST_NORM, skipped)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        done += 1
    assert skipped.longest is not None
    if not bool(torch.isfinite(value.detach())) or int(skipped.longest) >= settings.max_skipped_steps:
        raise InputError("collapse.refine.learning_rate", f"{learning_rate} made losses not finite; lower it")
    return done
