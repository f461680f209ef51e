"""When one may look at values on the device: at Lightning's logging interval, where Lightning looks too."""

from lightning.pytorch import Trainer


def logs_after(trainer: Trainer, steps: int) -> bool:
    """Whether Lightning logs once `steps` optimizer steps are done; an interval of 0 is never."""
    interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by the logger connector
    return interval > 0 and steps % interval == 0
