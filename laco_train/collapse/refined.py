"""Weights that were fitted: from a strategy into the file of a plan, and from there into the collapsed model."""

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from laco_train.collapse.choice import Fitted
from laco_train.collapse.decoder import Decoder
from laco_train.collapse.merge import FITTED
from laco_train.collapse.plan import CollapsePlan, Refined
from laco_train.errors import InputError


def refined_file(decoder: Decoder, fitted: Fitted) -> tuple[Refined, bytes]:
    """What a plan records of `fitted`, and the content of its safetensors file, named as in the collapsed model."""
    prefix = f"{decoder.family.stack}.{fitted.layer}"
    tensors = {f"{prefix}.{name}": value.to("cpu").contiguous() for name, value in fitted.weights.items()}
    content = safetensors.torch.save(tensors)
    return Refined.of(content, fitted.tokens, fitted.seconds), content


def refuse_missing_weights(plan: CollapsePlan) -> None:
    """InputError if the file of fitted weights that `plan` names was not beside it."""
    if plan.refined is not None and plan.refined_weights is None:
        name = plan.refined.file
        raise InputError("collapse.plan", f"its weights are in {name}, which is missing; put it beside the plan")


def refined_tensors(decoder: Decoder, plan: CollapsePlan, *, may_miss: bool) -> dict[str, Tensor]:
    """The tensors of `plan` by their names in the collapsed model; `decoder` is the source's.

    Raises:
        InputError: they are not at hand (unless they `may_miss`), are not weights of this model, or lack some of a
            layer that a strategy fitted.
    """
    if not may_miss:
        refuse_missing_weights(plan)
    if plan.refined is None or plan.refined_weights is None:
        return {}
    name = plan.refined.file
    try:
        tensors = safetensors.torch.load(plan.refined_weights)
    except SafetensorError as error:
        raise InputError("collapse.plan", f"{name} is no safetensors file: {error}") from None
    stack = decoder.family.stack
    shapes = {
        f"{stack}.{new}.{name}": parameter.shape
        for new, held in enumerate(plan.lineage)
        for name, parameter in decoder.stack[held[0]].named_parameters()
    }
    rest = dict(decoder.model.named_parameters())
    shapes |= {name: p.shape for name, p in rest.items() if not name.startswith(f"{stack}.")}
    for tensor_name, tensor in tensors.items():
        if shapes.get(tensor_name) != tensor.shape:
            raise InputError("collapse.plan", f"{name} holds {tensor_name}, which does not fit the collapsed model")
    if plan.merge_rule == FITTED:
        fitted = tuple(f"{stack}.{new}." for new, held in enumerate(plan.lineage) if len(held) > 1)
        missing = [each for each in shapes if each.startswith(fitted) and each not in tensors]
        if missing:
            raise InputError("collapse.plan", f"{name} lacks {missing[0]}, of a layer that was fitted")
    return tensors
