"""Lightning's DDP, set so that summing gradients over GPUs disturbs the backward pass little (issue 9, DDP)."""

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# MiB of gradients that are summed at once, where torch has 25: 0.8 ms less of a step of 75 on one machine, nothing told
# apart on another (docs/many_gpus.md). The last sum hides behind nothing anyway: the embedding's gradient is as large.
BUCKET_MIB = 100


class OurDDP(DDPStrategy):
    """Lightning's DDP on the stream that trains, with gradients that lie in their buckets, and larger ones.

    Lightning makes it on a stream of its own, as graphs of whole steps need; each gradient is then handed over to that
    stream, of which torch warns (AccumulateGrad), and a gigabyte more is held at 135M. What Lightning would pass on to
    DDP, this does, ahead of its own.
    """

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        options = {"gradient_as_bucket_view": True, "bucket_cap_mb": BUCKET_MIB, **self._ddp_kwargs}
        return DistributedDataParallel(model, device_ids=self.determine_ddp_device_ids(), **options)


def use_our_ddp() -> None:
    """Let the name ddp, which Lightning's auto takes on several devices too, be `OurDDP`.

    Other names, such as ddp_spawn, and the class itself stay Lightning's.
    """
    StrategyRegistry.register("ddp", OurDDP, OurDDP.__doc__, override=True, start_method="popen")


def gradients_stay(trainer: Trainer) -> bool:
    """Whether buckets of DDP are all the memory that gradients take, and keep it between steps.

    Where batches are accumulated, gradients lie beside them until the last one.
    """
    wrapped = trainer.strategy.model
    in_buckets = isinstance(wrapped, DistributedDataParallel) and wrapped.gradient_as_bucket_view
    return in_buckets and trainer.accumulate_grad_batches == 1
