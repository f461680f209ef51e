"""A view on a causal LM's decoder stack, and surgery on it: which layers stay, numbered anew, config cut alike."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from laco_train.collapse.families import Family, family_of, submodule
from laco_train.collapse.rebuild import cut_config, refuse_unfaithful
from laco_train.errors import InputError


@dataclass(frozen=True)
class Decoder:
    """Where a model keeps its layers.

    Attributes:
        model: the causal LM.
        family: the row that says where its parts are.
        stack: its decoder layers, in order.
        norm: the norm after the last layer, or None.
    """

    model: PreTrainedModel
    family: Family
    stack: nn.ModuleList
    norm: nn.Module | None

    @property
    def config(self) -> PretrainedConfig:
        """The config that holds the depth."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the model takes its input: its embeddings' device, as layers may lie elsewhere."""
        return next(self.model.get_input_embeddings().parameters()).device

    @property
    def depth(self) -> int:
        """Number of decoder layers."""
        return len(self.stack)

    def layer_type(self, index: int) -> tuple[object, ...]:
        """What tells layer `index` (from 0) from others of equal shapes: sliding or full attention, RoPE or none."""
        lists = (getattr(self.config, name, None) for name in self.family.per_layer)
        listed = tuple(values[index] for values in lists if values is not None)
        return (type(self.stack[index]).__name__, *listed)


def parameters_a_layer(decoder: Decoder, key: str) -> int:
    """Parameters of one layer, whichever it is.

    Raises:
        InputError: layers differ in size, so that the share of the parameters that recipe key `key` names is no depth.
    """
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in decoder.stack]
    if min(sizes) < max(sizes):
        raise InputError(
            key,
            f"layers of this {decoder.config.model_type} differ in size ({min(sizes):,} to {max(sizes):,} parameters), "
            "so that a share of the parameters is no depth; set collapse.target_depth",
        )
    return sizes[0]


def decoder_of(model: PreTrainedModel) -> Decoder:
    """The decoder of `model`; InputError for a model whose stack can't be told with certainty."""
    family = family_of(model)
    stack = submodule(model, family.stack)
    if not isinstance(stack, nn.ModuleList):
        kind = model.config.model_type
        raise InputError("model.source", f"{kind} has no decoder layers at {family.stack}")
    if len(stack) != model.config.num_hidden_layers:
        raise InputError(
            "model.source", f"its config says {model.config.num_hidden_layers} layers, but the model has {len(stack)}"
        )
    norm = submodule(model, family.norm) if family.norm is not None else None
    return Decoder(model, family, stack, norm)


def collapsible(model: PreTrainedModel) -> Decoder:
    """The decoder of `model` as it was loaded, without adapters; InputError if it can't do with fewer layers."""
    decoder = decoder_of(model)
    refuse_unfaithful(model, decoder.family, decoder.stack)
    return decoder


def keep_layers(decoder: Decoder, kept: Sequence[int]) -> Decoder:
    """Cut the stack to the layers `kept` (indices from 0, ascending), in place, and return the new view.

    Renumbers ``layer_idx`` wherever it sits, else a KV cache breaks, and cuts every config list that follows the depth,
    else the saved model is wrong (framework facts; transformers #30508).
    """
    model, family = decoder.model, decoder.family
    container = model.get_submodule(family.stack.rpartition(".")[0])
    stack = nn.ModuleList([decoder.stack[index] for index in kept])
    stack.training = decoder.stack.training
    setattr(container, family.stack.rpartition(".")[2], stack)
    for index, layer in enumerate(stack):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = index  # type: ignore[assignment]
    cut_config(model.config, family, kept)
    return Decoder(model, family, stack, decoder.norm)
