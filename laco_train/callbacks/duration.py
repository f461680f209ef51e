"""Says before a CPU run begins how long it will take."""

import time

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator

from laco_train.settings import DataSettings

# Share of the matrix-product rate that training reaches; measured on SmolLM2-135M in float32, two cores.
_EFFICIENCY = 0.6


def matmul_rate(size: int = 768) -> float:
    """Floating-point operations per second of a float32 product on the CPU, by a run of about 0.1 s."""
    a = torch.randn(size, size)
    a @ a
    began, runs = time.perf_counter(), 0
    while time.perf_counter() - began < 0.1:
        a @ a
        runs += 1
    return runs * 2 * size**3 / (time.perf_counter() - began)


def as_duration(seconds: float) -> str:
    """Seconds in the unit that people use."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


class EstimateDuration(Callback):
    """Prints an estimate of the training time on the CPU, at 6 operations a parameter and token."""

    def __init__(self, data: DataSettings):
        self.data = data

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the estimate; a GPU run is short enough to do without."""
        if not isinstance(trainer.accelerator, CPUAccelerator):
            return
        steps = pl_module.total_steps()  # type: ignore[operator]
        tokens = steps * trainer.accumulate_grad_batches * self.data.batch_size * self.data.block_size
        parameters = sum(p.numel() for p in pl_module.parameters())
        seconds = 6 * parameters * tokens / (_EFFICIENCY * matmul_rate())
        print(f"Training: {steps} steps, {tokens:,} tokens, about {as_duration(seconds)} on this CPU.", flush=True)
