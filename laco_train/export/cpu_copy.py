"""A model's copy on the CPU, free of everything that training hung on it; the model itself is not touched."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from transformers import PreTrainedModel

from laco_train.training.attention import attends_by_documents, set_document_attention


@torch.no_grad()
def cpu_copy(model: nn.Module, dtype: torch.dtype) -> PreTrainedModel:
    """`model` in eval mode on the CPU, parameters cast to `dtype`, buffers in their own dtype, ties kept.

    LoRA is merged in float32 and rounded once. Gradients, hooks, compiled wrappers and forwards patched onto single
    modules stay behind. The GPU needs no memory for it; the CPU holds one copy, in float32 while LoRA merges.

    Args:
        model: a causal LM, perhaps on a GPU, in training, compiled, or wrapped by peft.
        dtype: floating-point type of the copy's parameters.
    """
    source = model._orig_mod if isinstance(model, OptimizedModule) else model
    adapted = isinstance(source, PeftModel)
    duplicate = _detached_copy(source, torch.float32 if adapted else dtype)
    if adapted:
        duplicate = duplicate.merge_and_unload()
        for parameter in duplicate.parameters():
            parameter.data = _cast(parameter.data, dtype)
    assert isinstance(duplicate, PreTrainedModel)
    if attends_by_documents(duplicate):
        set_document_attention(duplicate, False)
    return duplicate.eval().requires_grad_(False)


@torch.no_grad()
def adapted_copy(model: nn.Module, dtype: torch.dtype) -> PeftModel:
    """`model` with its adapters apart, in eval mode on the CPU, in float32; its base went through `dtype`.

    Args:
        model: a causal LM wrapped by peft, as for `cpu_copy`.
        dtype: type that the base's parameters are rounded to before they are float32 again.
    """
    source = model._orig_mod if isinstance(model, OptimizedModule) else model
    duplicate = _detached_copy(source, torch.float32)
    assert isinstance(duplicate, PeftModel)
    for name, parameter in duplicate.named_parameters():
        if "lora_" not in name:
            parameter.data = _cast(parameter.data, dtype).float()
    base = duplicate.get_base_model()
    if attends_by_documents(base):
        set_document_attention(base, False)
    return duplicate.eval().requires_grad_(False)


def _detached_copy(model: nn.Module, dtype: torch.dtype) -> Any:
    # What deepcopy finds in its memo it takes as copied: that is how tensors reach the CPU and hooks stay behind.
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(_cast(parameter.detach(), dtype, fresh=True), requires_grad=False)
    for module in model.modules():
        for tensor in _other_tensors(module):
            memo[id(tensor)] = tensor.detach().to("cpu", copy=True)
        for name, value in vars(module).items():
            if "_hooks" in name and isinstance(value, dict):
                memo[id(value)] = type(value)()
    for module in model.modules():
        if isinstance(module, OptimizedModule):
            memo[id(module)] = copy.deepcopy(module._orig_mod, memo)
    duplicate = copy.deepcopy(model, memo)
    for module in duplicate.modules():
        # a patched forward (Liger, accelerate) belongs to the machine that trains
        vars(module).pop("forward", None)
    return duplicate


def _other_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Buffers of `module` itself, and tensors that it keeps as plain attributes."""
    for value in (*module.buffers(recurse=False), *vars(module).values()):
        if isinstance(value, Tensor):
            yield value


def _cast(tensor: Tensor, dtype: torch.dtype, *, fresh: bool = False) -> Tensor:
    return tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype, copy=fresh)
