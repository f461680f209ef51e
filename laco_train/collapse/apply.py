"""From settings to a plan, and from a plan to the collapsed model."""

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from laco_train.checks import check_collapse
from laco_train.collapse.choice import Choice
from laco_train.collapse.decoder import Decoder, collapsible, decoder_of, keep_layers, parameters_a_layer
from laco_train.collapse.merge import DROP, is_norm, merge_weights, merged_names
from laco_train.collapse.placement import OnDevice, Streamed, free_bytes, resolve, rest_on, sizes_of
from laco_train.collapse.plan import Calibration, Candidate, CollapsePlan, Parameters, dropped_by, lineage_after
from laco_train.collapse.refined import refined_file, refined_tensors
from laco_train.collapse.similarity import calibration_batch, read_calibration
from laco_train.collapse.strategies import STRATEGIES
from laco_train.collapse.walk import Walk
from laco_train.errors import InputError
from laco_train.settings import CollapseSettings

_SAMPLES = 64
"""Weights, evenly spaced, that stand for all of a matrix in a fingerprint, or up to twice as many."""


def fingerprint(model: PreTrainedModel) -> str:
    """sha256 over sorted parameter names, shapes and dtypes, the norms' weights and samples of all others.

    Cheap on any size of model, and yet different for models that differ in training, adapters merged in included:
    those leave norms as they were.
    """
    digest = hashlib.sha256()
    parameters = dict(model.named_parameters())
    owners = dict(model.named_modules())
    for name in sorted(parameters):
        value = parameters[name]
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        flat = value.detach().flatten()
        if not is_norm(owners[name.rpartition(".")[0]]):
            flat = flat[:: max(1, flat.numel() // _SAMPLES)]
        digest.update(flat.to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for the time of the block; afterwards each module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def count_parameters(model: PreTrainedModel) -> int:
    """Number of parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def collapse_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: CollapseSettings,
    *,
    source: str = "",
    device: torch.device | None = None,
    on_candidate: Callable[[Candidate], None] | None = None,
) -> tuple[PreTrainedModel, CollapsePlan]:
    """Collapse `model` in place by a strategy, a saved plan or a list of layers.

    Args:
        model: a decoder-only causal LM.
        tokenizer: its tokenizer, for the calibration text.
        settings: see CollapseSettings.
        source: where the model came from, recorded in the plan.
        device: where to search; None: where the model is. Weights move there, or are streamed (collapse.placement).
        on_candidate: called after each candidate of a search; a search for a target may try one again.

    Returns:
        The model that was passed, and the plan that was applied to it.

    Raises:
        InputError: settings that don't fit the model, a plan of another model, an unsupported family.
    """
    if settings.plan is not None:
        check_collapse(settings)
        plan = CollapsePlan.load(settings.plan)
    else:
        plan = make_plan(model, tokenizer, settings, source=source, device=device, on_candidate=on_candidate)
    return apply_plan(model, plan), plan


def make_plan(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: CollapseSettings,
    *,
    source: str = "",
    device: torch.device | None = None,
    on_candidate: Callable[[Candidate], None] | None = None,
) -> CollapsePlan:
    """Choose layers of `model` by `settings`, leaving it as it is; see `collapse_model`."""
    decoder = collapsible(model)
    check_collapse(settings, decoder.depth)
    calibration: Calibration | None = None
    strategy: str = settings.strategy
    if settings.remove is not None:
        choice, strategy = Choice(DROP, removed=tuple(sorted(settings.remove))), "remove"
    elif strategy == "none":
        choice = Choice(settings.merge_rule)
    else:
        batch = calibration_batch(tokenizer, read_calibration(settings.calibration))
        target = target_depth(decoder, settings)
        began = time.perf_counter()
        with evaluating(model), torch.no_grad(), placed(decoder, settings, device or model.device) as placement:
            walk = Walk(decoder, batch, settings, placement)
            choice = STRATEGIES[settings.strategy](walk, settings, target, on_candidate)
            seconds = time.perf_counter() - began
            calibration = Calibration(batch.samples, batch.tokens, batch.sha256, *losses_of(walk), seconds)
        settings = dataclasses.replace(settings, similarity_threshold=choice.threshold)
    refined = weights = None
    if choice.fitted is not None:
        refined, weights = refined_file(decoder, choice.fitted)
    lineage = lineage_after(decoder.depth, choice.merges, choice.removed, dropping=choice.merge_rule == DROP)
    before = count_parameters(model)
    lost = set(range(decoder.depth)) - {layer[0] for layer in lineage}
    after = before - sum(p.numel() for index in lost for p in decoder.stack[index].parameters())
    return CollapsePlan(
        source=source,
        source_fingerprint=fingerprint(model),
        dtype=str(model.dtype).removeprefix("torch."),
        strategy=strategy,
        round=0,
        source_depth=decoder.depth,
        depth=len(lineage),
        settings=dataclasses.asdict(settings),
        merge_rule=choice.merge_rule,
        merge_norms=settings.merge_norms,
        merges=choice.merges,
        removed=dropped_by(decoder.depth, lineage),
        candidates=choice.candidates,
        lineage=lineage,
        parameters=Parameters(before, after, 1 - after / before),
        calibration=calibration,
        refined=refined,
        refined_weights=weights,
    )


@contextmanager
def placed(decoder: Decoder, settings: CollapseSettings, device: torch.device) -> Iterator[OnDevice | Streamed]:
    """The weights where `collapse.placement` wants them for a search on `device`."""
    if placement_for(decoder, settings, device) == "device":
        decoder.model.to(device)  # type: ignore[arg-type]  # Transformers wraps to() for bitsandbytes
        yield OnDevice()
        return
    if settings.strategy == "streamline":
        raise InputError("collapse.placement", "stream can't fit a layer, as strategy streamline does; use device")
    with rest_on(decoder, device):
        yield Streamed(device, settings.layers_per_merge + 2)


def placement_for(decoder: Decoder, settings: CollapseSettings, device: torch.device) -> Literal["device", "stream"]:
    """What `collapse.placement` means for this model on `device`; InputError if it can't fit."""
    on_it = sum(p.numel() * p.element_size() for p in decoder.model.parameters() if p.device == device)
    free = free_bytes(device) + on_it
    return resolve(settings.placement, sizes_of(decoder), device, settings.layers_per_merge, free)


def losses_of(walk: Walk) -> tuple[float | None, float | None]:
    """Calibration loss of the original and of the standing model; None where there is no such number."""
    before = walk.calibration_loss.of_original
    after = None if before is None else walk.measure_standing(losses=True).loss
    return before, after if after is not None and math.isfinite(after) else None


def target_depth(decoder: Decoder, settings: CollapseSettings) -> int | None:
    """Layers that may remain at most, or None without a target.

    Raises:
        InputError: the ratio asks for less than half a layer, or for more than all layers but one; or layers differ in
            size.
    """
    if settings.target_ratio is None:
        return settings.target_depth
    layer = parameters_a_layer(decoder, "collapse.target_ratio")
    layers = round(settings.target_ratio * count_parameters(decoder.model) / layer)
    if not 1 <= layers < decoder.depth:
        raise InputError(
            "collapse.target_ratio",
            f"{settings.target_ratio} of all parameters is {layers} layers of {decoder.depth}, "
            f"each {100 * layer / count_parameters(decoder.model):.1f}%",
        )
    return decoder.depth - layers


@torch.no_grad()
def apply_plan(model: PreTrainedModel, plan: CollapsePlan, *, weights_follow: bool = False) -> PreTrainedModel:
    """Collapse `model` in place as `plan` says, bit for bit as the search that made the plan saw it.

    Args:
        model: the plan's source.
        plan: with its refined weights, if it has any.
        weights_follow: every weight is loaded afterwards, from a checkpoint, so that the refined ones may be missing.

    Raises:
        InputError: the plan is composed, belongs to another model (depth or fingerprint), or its refined weights are
            missing.
    """
    refuse_other_model(decoder_of(model), plan)
    decoder = collapsible(model)
    refined = refined_tensors(decoder, plan, may_miss=weights_follow)
    weights: list[dict[str, Tensor]] = [dict(layer.named_parameters()) for layer in decoder.stack]
    standing = list(range(decoder.depth))
    for merge in plan.merges:
        window = standing[merge.layer : merge.layer + merge.absorbed + 1]
        names = merged_names(decoder.stack[window[0]], plan.merge_norms)
        for name, value in merge_weights(plan.merge_rule, [weights[index] for index in window], names).items():
            weights[window[0]][name].copy_(value)
        del standing[merge.layer + 1 : merge.layer + merge.absorbed + 1]
    keep_layers(decoder, [layer[0] for layer in plan.lineage])
    for name, value in refined.items():
        model.get_parameter(name).copy_(value)
    return model


def refuse_other_model(decoder: Decoder, plan: CollapsePlan) -> None:
    """InputError unless `plan` was made for this very model, and can be applied at all."""
    refuse_unlike_model(plan, decoder.depth, decoder.model.dtype)
    if plan.source_fingerprint != fingerprint(decoder.model):
        raise InputError("collapse.plan", f"was made for another model ({plan.source}): fingerprints differ")


def refuse_unlike_model(plan: CollapsePlan, depth: int, dtype: torch.dtype) -> None:
    """InputError unless `plan` can be applied to a model of `depth` layers and weights of `dtype`; none is read."""
    if plan.rounds:
        raise InputError(
            "collapse.plan",
            f"is composed of {len(plan.rounds)} rounds with training between them, so that it says where layers come "
            "from and can't be applied; name the collapse_plan.json of one round",
        )
    if plan.source_depth != depth:
        raise InputError(
            "collapse.plan", f"was made for {plan.source_depth} layers ({plan.source}), this model has {depth}"
        )
    given = str(dtype).removeprefix("torch.")
    if plan.dtype != given:
        raise InputError(
            "collapse.plan", f"was made for {plan.dtype} weights, these are {given}; set model.dtype: {plan.dtype}"
        )
