"""What Transformers builds from a config whose layers were cut: the same layers, or a model that reloads as another.

A layer may depend on its position in ways that no config list shows: GPT-2 may scale attention by it, DiffLlama
derives a constant from it, DeepSeek keeps the first layers without experts. Such a model would work in memory and be
wrong once saved and loaded, without a word. So the cut is tried on the meta device before anything is searched.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from laco_train.collapse.families import Family
from laco_train.errors import InputError

# Set from outside or in passing, not by the config.
_NOT_FUNCTION = ("layer_idx", "training", "gradient_checkpointing")


def cut_config(config: PretrainedConfig, family: Family, kept: Sequence[int]) -> None:
    """Make `config` that of the layers `kept` (indices from 0, ascending), in place.

    Entries that only filled a list that was missing (max_window_layers, sliding_window_pattern, no_rope_layer_interval)
    stay as they are: Transformers reads the list where there is one.
    """
    if family.dense_layers is not None:
        names, step = family.dense_layers
        every = getattr(config, step)
        dense = {index for index in kept if index in (getattr(config, names) or ()) or (index + 1) % every}
        setattr(config, names, [new for new, old in enumerate(kept) if old in dense])
        setattr(config, step, 1)
    for name in family.per_layer:
        values = getattr(config, name, None)
        if values is not None:
            setattr(config, name, [values[index] for index in kept])
    config.num_hidden_layers = len(kept)


def refuse_unfaithful(model: PreTrainedModel, family: Family, stack: nn.ModuleList) -> None:
    """InputError if layers of `model` would be rebuilt as others once one is removed.

    What holds for removing the first layer (every index shifts) and for removing the last (the depth shrinks) holds for
    any removal. Costs two models on the meta device: no memory, and a part of a second.
    """
    everything = range(len(stack))
    if len(stack) == 1 or model.is_remote_code():  # such code need not run on the meta device
        return
    for kept in (everything[1:], everything[:-1]):
        difference = _difference(model, family, stack, kept)
        if difference is not None:
            raise InputError(
                "model.source",
                f"layers of this {model.config.model_type} depend on their position ({difference}), so that those "
                "around a removed one would be reloaded as others; use a family that the README lists",
            )


def _difference(model: PreTrainedModel, family: Family, stack: nn.ModuleList, kept: Sequence[int]) -> str | None:
    """What differs between the layers `kept` and those that their config gives, or None."""
    config = copy.deepcopy(model.config)
    cut_config(config, family, kept)
    try:
        # through a dict, as through config.json, so that what a config derives from its entries is derived anew
        config = type(config).from_dict(config.to_dict())
    except (StrictDataclassError, ValueError) as error:
        return " ".join(str(error).split())[:200]
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        rebuilt = type(model)(config)
    outside = [_shapes(m, leaving_out=f"{family.stack}.") for m in (model, rebuilt)]
    if outside[0] != outside[1]:
        return "weights outside of the layers follow the depth"
    layers = rebuilt.get_submodule(family.stack)
    assert isinstance(layers, nn.ModuleList)
    for index, layer in zip(kept, layers, strict=True):
        mine, theirs = _function(stack[index]), _function(layer)
        other = next((n for n in sorted(mine.keys() | theirs.keys()) if mine.get(n) != theirs.get(n)), None)
        if other is not None:
            return f"{other} of layer {index}"
    return None


def _shapes(module: nn.Module, leaving_out: str | None = None) -> dict[str, Any]:
    named = module.named_parameters()
    return {name: p.shape for name, p in named if leaving_out is None or not name.startswith(leaving_out)}


def _function(layer: nn.Module) -> dict[str, Any]:
    """What `layer` computes, weights aside: shapes, classes, and the plain values that its modules hold."""
    found: dict[str, Any] = dict(_shapes(layer))
    for path, module in layer.named_modules():
        found[f"{path or 'the'} class"] = type(module).__name__
        for name, value in vars(module).items():
            plain = isinstance(value, (bool, int, float, str, type(None)))
            if plain and not name.startswith("_") and name not in _NOT_FUNCTION:
                found[f"{path}.{name}".lstrip(".")] = value
    return found
