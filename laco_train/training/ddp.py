"""Lightning's DDP, set so that summing gradients over GPUs disturbs the backward pass little (issue 9, DDP)."""

import torch
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch import nn
from torch.nn.parallel import DistributedDataParallel

_PROBE_MIB, _ROUNDS = 64, 5
_FAST = 100e9  # bytes a second: PCIe and most networks move fewer, NVLink more
# Summing takes multiprocessors from the backward pass. Where all gradients of a small model are summed in about a
# millisecond, that is better done in few large pieces, if not after it; elsewhere torch's 25 MiB hide more behind it.
_FAST_BUCKET_MIB = 512


class OurDDP(DDPStrategy):
    """Lightning's DDP on the stream that trains, with gradients that lie in their buckets, sized by the link.

    Lightning makes it on a stream of its own, as graphs of whole steps need; each gradient is then handed over to that
    stream (torch's warning on AccumulateGrad). What Lightning would pass on to DDP, this does, ahead of its own.
    """

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        options = {"gradient_as_bucket_view": True, **_buckets(self.root_device), **self._ddp_kwargs}
        return DistributedDataParallel(model, device_ids=self.determine_ddp_device_ids(), **options)


def use_our_ddp() -> None:
    """Let the name ddp, which Lightning's auto takes on several devices too, be `OurDDP`.

    Other names, such as ddp_spawn, and the class itself stay Lightning's.
    """
    StrategyRegistry.register("ddp", OurDDP, OurDDP.__doc__, override=True, start_method="popen")


def _buckets(device: torch.device) -> dict[str, int]:
    """What DDP is told of their size; nothing: torch's own. The same on all ranks, and so are sums from run to run."""
    if device.type != "cuda" or summed_per_second(device) < _FAST:
        return {}
    return {"bucket_cap_mb": _FAST_BUCKET_MIB}


def summed_per_second(device: torch.device) -> float:
    """Bytes a second that all ranks sum, the best of some rounds; the same number on every rank, which all call it.

    Args:
        device: of this rank, a CUDA device.
    """
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    values = torch.zeros(_PROBE_MIB * 2**18, device=device)
    torch.distributed.all_reduce(values)  # connects the ranks
    seconds = []
    for _ in range(_ROUNDS):
        first.record()
        torch.distributed.all_reduce(values)
        last.record()
        last.synchronize()
        seconds.append(first.elapsed_time(last) / 1000)
    slowest = torch.tensor(min(seconds), device=device)
    torch.distributed.all_reduce(slowest, torch.distributed.ReduceOp.MAX)
    return values.nbytes / float(slowest)
