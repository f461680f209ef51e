"""Says before a CPU run begins how long it will take."""

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator

from laco_train.callbacks.utilisation import Utilisation
from laco_train.training.budget import batches_in
from laco_train.training.checkpoint import TrainingCheckpoint
from laco_train.training.module import CausalLM

# Share of the matrix-product rate that training reaches; measured on SmolLM2-135M in float32, two cores.
_EFFICIENCY = 0.6


def as_duration(seconds: float) -> str:
    """Seconds in the unit that people use."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


class EstimateDuration(Callback):
    """Prints an estimate of the training time on the CPU, at 6 operations a parameter and token.

    Args:
        utilisation: has measured the rate of matrix products by `on_fit_start`.
        resumed: what the run goes on from; None: it begins.
    """

    def __init__(self, utilisation: Utilisation, resumed: TrainingCheckpoint | None):
        self.utilisation = utilisation
        self.done = 0 if resumed is None else resumed.steps

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the estimate; a GPU run is short enough to do without."""
        if not isinstance(trainer.accelerator, CPUAccelerator) or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, CausalLM)
        steps, batches = pl_module.total_steps(), max(pl_module.epoch_batches(), 1)
        left = [batches_in(count, batches, trainer.accumulate_grad_batches) for count in (steps, self.done)]
        tokens = max(0, left[0] - left[1]) * pl_module.batch_tokens()
        parameters = sum(p.numel() for p in pl_module.lm.parameters())
        seconds = 6 * parameters * tokens / (_EFFICIENCY * self.utilisation.rate)
        told = f"{max(0, steps - self.done)} steps, {tokens:,} tokens"
        print(f"Training: {told}, about {as_duration(seconds)} on this CPU.", flush=True)
