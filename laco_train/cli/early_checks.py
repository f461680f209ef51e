"""What a run asks of its model, checked by settings, config and an empty model: before weights are read and measured.

Each of these is refused again where it is used; here it costs no minutes of validation and search.
"""

import warnings
from collections.abc import Callable

import torch
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel

from laco_train.checks import check_collapse, least_depth, out_of_reach, target_key
from laco_train.collapse import CollapsePlan, Decoder, decoder_of
from laco_train.collapse.apply import refuse_unlike_model, target_depth
from laco_train.collapse.composition import plan_of_source
from laco_train.collapse.families import depth_of
from laco_train.collapse.refined import refuse_missing_weights
from laco_train.collapse.similarity import read_calibration
from laco_train.collapse.unmerged import nothing_merged
from laco_train.collapse.windows import refuse_unmergeable, skipped_at_first
from laco_train.errors import InputError
from laco_train.settings import CollapseSettings, LoraSettings, ModelSettings
from laco_train.training.adapters import ALL_LINEAR, attach_lora, left_alone
from laco_train.training.distill import distills
from laco_train.training.parallel import skeleton
from laco_train.training.teacher import check_source


def check_start(
    model: ModelSettings,
    collapse: CollapseSettings,
    config: PretrainedConfig,
    dtype: torch.dtype,
    *,
    trains: bool,
    say: Callable[[str], None] = print,
) -> None:
    """Refuse a run that begins with a collapse which this model can't go through, or can't be trained after.

    Args:
        model, collapse: sections of the recipe.
        config: of model.source.
        dtype: of the weights.
        trains: whether the run is a fit.
        say: called with a line on what LoRA leaves alone.

    Raises:
        InputError: see the checks.
    """
    depth = depth_of(config)
    check_collapse(collapse, depth)
    first = plan_of_source(model.source, depth)
    plan = None if collapse.plan is None else _plan(collapse.plan, depth, dtype, trains=trains)
    if plan is None and collapse.remove is None:
        read_calibration(collapse.calibration)
    d = model.distill
    if trains and distills(d) and d.teacher is not None:
        whole = depth if first is None or first.source != d.teacher else first.source_depth  # before all rounds
        check_source(model, whole if d.hidden > 0 else None)
    if model.trust_remote_code:  # code that comes with a model, or a kernel, need not run without weights
        return
    empty = skeleton(model.source, dtype=dtype)
    left = plan.depth if plan is not None else _most_left(decoder_of(empty), collapse)
    if model.method == "last_layers" and model.last_layers > left:
        problem = f"is {model.last_layers}, but {left} layers at most will be left; lower it"
        raise InputError("model.last_layers", problem)
    if model.method == "lora":
        alone = left_alone(_adapted(empty, model.lora))
        if trains and alone is not None and model.lora.targets in (ALL_LINEAR, [ALL_LINEAR]):
            say(alone)


def _plan(path: str, depth: int, dtype: torch.dtype, *, trains: bool) -> CollapsePlan:
    """The plan at `path`, refused where its own words tell that it can't be applied to this model."""
    plan = CollapsePlan.load(path)
    refuse_unlike_model(plan, depth, dtype)
    refuse_missing_weights(plan)
    if trains and nothing_merged(plan):
        problem = f"{path} merges nothing, so that the whole original would train; drop it, and lower T of the search"
        raise InputError("collapse.plan", f"{problem} or set collapse.strategy: none")
    return plan


def _most_left(decoder: Decoder, collapse: CollapseSettings) -> int:
    """Layers that a collapse leaves at most; one that can't reach its target is refused."""
    if collapse.remove is not None:
        return decoder.depth - len(collapse.remove)
    target = target_depth(decoder, collapse)
    if collapse.strategy in ("laco", "greedy"):
        refuse_unmergeable(decoder, [collapse], target)
    if target is None:
        return decoder.depth
    least = least_depth(collapse, decoder.depth)
    if target < least:
        asked = target if collapse.target_ratio is None else f"{collapse.target_ratio}, or {target} layers"
        skipped = skipped_at_first(decoder, collapse, target)
        why = out_of_reach(collapse, least) + ("" if skipped is None else f"; {skipped}")
        raise InputError(target_key(collapse), f"is {asked}, {why}")
    return target


def _adapted(empty: PreTrainedModel, lora: LoraSettings) -> PeftModel:
    """`empty` with adapters, drawn without moving the run's random numbers; their warnings come with the real ones."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return attach_lora(empty, lora)
