"""Several processes: one rank reads, chooses and writes, and every rank trains its share.

Rank 0 loads the source and collapses it; the other ranks build the same shape without weights (the meta device). Then
weights go from rank 0 to all, a block at a time: whole under DDP, a shard for each rank under FSDP2. So the host needs
memory for one copy of the model, however many ranks it has, and every rank trains from the same bits.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from accelerate import init_empty_weights
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from laco_train.collapse import decoder_of
from laco_train.errors import InputError
from laco_train.models import load_config
from laco_train.training.loss import base_of

T = TypeVar("T")
KEY = "trainer.strategy"


class ToldByRankZero(SystemExit):
    """Ends a rank because rank 0 failed, and says so itself: nothing is printed here."""


def on_rank_zero(trainer: Trainer, work: Callable[[], T]) -> T:
    """What `work` gives on rank 0, on every rank; `T` must be picklable if there are several.

    Raises:
        ToldByRankZero: on the other ranks, if `work` failed; rank 0 raises what went wrong.
    """
    if trainer.world_size == 1:
        return work()
    result, failure, code = None, None, 0
    if trainer.is_global_zero:
        try:
            result = work()
        except (Exception, KeyboardInterrupt) as error:
            failure, code = error, 2 if isinstance(error, InputError) else 1
    result, code = trainer.strategy.broadcast((result, code))
    if failure is not None:
        raise failure
    if code:
        raise ToldByRankZero(code)
    return result  # type: ignore[return-value]


def skeleton(source: str, *, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model at `source` with its parameters on the meta device; buffers are real. No weights are read."""
    config = load_config(source, trust_remote_code=trust_remote_code)
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    model.tie_weights()  # moved to the meta device one by one, ties came apart
    return model.eval()


@torch.no_grad()
def distribute(model: PreTrainedModel | PeftModel, strategy: Strategy, precision: str) -> None:
    """Give every rank rank 0's weights, in place: all of them on its device, or its shard under ModelParallelStrategy.

    A second call changes nothing. Peak memory on a device is what stays there and one block.

    Args:
        model: collapsed, adapters attached; parameters of other ranks than 0 may be on the meta device.
        strategy: its processes are connected.
        precision: Lightning's name, such as ``bf16-true``.
    """
    if isinstance(model, FSDPModule):
        return
    strategy.precision_plugin.convert_module(model)  # as the strategy will, but a block needs one type to be sharded
    take_dtypes(model, strategy.broadcast(dtypes_of(model)))
    if not isinstance(strategy, ModelParallelStrategy):
        receive(model, strategy.root_device)
        return
    mesh = strategy.device_mesh["data_parallel"]
    policy = types_of(precision)
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    for block in (*decoder_of(base).stack, model):
        receive(block, strategy.root_device)
        fully_shard(block, mesh=mesh, mp_policy=policy)


def types_of(precision: str) -> MixedPrecisionPolicy:
    """In which types FSDP2 gathers weights and sums gradients under Lightning's `precision`.

    Their own, unless they are float32 under bf16-mixed: then bfloat16 and float32. So gradients of bfloat16 weights are
    summed in bfloat16, as one GPU that accumulates sums them.
    """
    mixed = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if precision == "bf16-mixed" else {}
    return MixedPrecisionPolicy(**mixed, cast_forward_inputs=False)


def dtypes_of(model: nn.Module) -> dict[str, torch.dtype]:
    """Type of each parameter and buffer, by name."""
    return {name: value.dtype for name, value in (*model.named_parameters(), *model.named_buffers())}


def take_dtypes(model: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Cast parameters and buffers to rank 0's types: some families keep a few weights in float32 as they are read."""
    own = dict((*model.named_parameters(), *model.named_buffers()))
    if own.keys() != dtypes.keys():
        raise RuntimeError(f"this rank's model is not rank 0's: {sorted(own.keys() ^ dtypes.keys())[:3]} differ")
    for name, value in own.items():
        value.data = value.data.to(dtypes[name])


def receive(block: nn.Module, device: torch.device) -> None:
    """Put what `block` holds on `device`, with rank 0's values; shards are left alone, ties stay ties."""
    moved: dict[Tensor, Tensor] = {}

    def sent(value: Tensor) -> Tensor:
        if value not in moved:
            here = torch.empty_like(value, device=device) if value.is_meta else value.detach().to(device)
            here = here.contiguous()
            torch.distributed.broadcast(here, 0)
            moved[value] = nn.Parameter(here, value.requires_grad) if isinstance(value, nn.Parameter) else here
        return moved[value]

    for module in block.modules():
        for held in cast("tuple[dict[str, Tensor | None], ...]", (module._parameters, module._buffers)):
            for name, value in held.items():
                if value is not None and not isinstance(value, DTensor):
                    held[name] = sent(value)


def gathered(module: nn.Module) -> dict[str, Tensor]:
    """State dict of a sharded `module` with whole tensors on the CPU of rank 0; empty elsewhere. All ranks call it."""
    return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))  # type: ignore[return-value]


def as_forward(model: nn.Module, work: Callable[[], T]) -> T:
    """What `work` gives, as the forward pass of `model`: a sharded one gathers its weights before, and frees them."""
    if not isinstance(model, FSDPModule):
        return work()
    model.forward = lambda work: work()
    try:
        return cast("T", model(work))  # without an argument, moving them to the GPU fails in torch 2.11
    finally:
        del model.forward


def gathered_bytes(model: nn.Module) -> int:
    """Bytes that the layers of a sharded `model` may add on a device while all are whole; 0 if it is not sharded.

    Twice their weights, which is what a Llama-2-7B shape on two GPUs added to the peak (docs/many_gpus.md).
    """
    shards = [p for layer in decoder_of(base_of(model)).stack for p in layer.parameters() if isinstance(p, DTensor)]
    return 2 * sum(p.numel() * p.element_size() for p in shards)


def keep_gathered(model: nn.Module) -> None:
    """Let the layers of a sharded `model` stay whole from the forward to the backward pass, which then gathers none."""
    for layer in decoder_of(base_of(model)).stack:
        if isinstance(layer, FSDPModule):
            layer.set_reshard_after_forward(False)


def whole(value: Tensor) -> Tensor:
    """`value` itself, or what a sharded one stands for; then all ranks must call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def local(value: Tensor) -> Tensor:
    """`value` itself, or this rank's share of a sharded one."""
    return value.to_local() if isinstance(value, DTensor) else value


def first_element(value: Tensor) -> int:
    """Which element of the whole the first one of this rank's share is; FSDP2 shards rows, as even as torch.chunk."""
    if not isinstance(value, DTensor):
        return 0
    rows, ranks = value.shape[0], value.device_mesh.size()
    return min(value.device_mesh.get_local_rank() * -(-rows // ranks), rows) * (value.numel() // max(rows, 1))


def refuse_strategy(strategy: str | Strategy) -> None:
    """InputError for a strategy, by its name or made, that wraps the model in ways that nothing here knows."""
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    if name.lower().startswith(("fsdp", "deepspeed", "xla")):
        raise InputError(
            KEY,
            f"{name} is not supported; use ddp, or lightning.pytorch.strategies.ModelParallelStrategy, which is FSDP2",
        )


def check_sizes(trainer: Trainer) -> None:
    """Refuse what ModelParallelStrategy can't do here, before processes are started.

    Raises:
        InputError: tensor parallelism, or sizes that don't fit the devices.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy):
        return
    data, tensor, world = strategy._data_parallel_size, strategy._tensor_parallel_size, trainer.world_size
    fix = f"set init_args.data_parallel_size: {world} and init_args.tensor_parallel_size: 1"
    if tensor != 1:
        raise InputError(KEY, f"tensor_parallel_size is {tensor}, but layers are sharded here, not split; {fix}")
    if data != world:
        raise InputError(KEY, f"data_parallel_size is {data}, but there are {world} processes; {fix}")
