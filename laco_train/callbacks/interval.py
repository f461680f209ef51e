"""When a callback may look at values on the device: at Lightning's logging interval, where Lightning looks too."""

from lightning.pytorch import Trainer


def logs_after(trainer: Trainer, steps: int) -> bool:
    """Whether Lightning logs once `steps` optimizer steps are done."""
    return steps % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]  # set by the logger connector
