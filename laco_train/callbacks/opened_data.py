"""What only the opened texts can show to be wrong is told before the search, not after it."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from laco_train.errors import InputError
from laco_train.training.module import CausalLM


class CheckOpenedData(Callback):
    """Refuses a resume on other texts, and validations that no epoch would come to.

    Args:
        began_with: of the run that is resumed, what its texts were, by role (`PackedText.summary`); None for a new one.
    """

    def __init__(self, began_with: Mapping[str, Any] | None):
        self.began_with = began_with

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The texts are open: Lightning sets up data before callbacks."""
        if stage != "fit":
            return
        assert isinstance(pl_module, CausalLM)
        now = trainer.datamodule.summary()  # type: ignore[attr-defined]
        for role, then in (self.began_with or {}).items():
            if then["sha256"] != now[role]["sha256"]:
                problem = "is another text than when the run began, or cut otherwise; put it back, or start a new run"
                raise InputError(f"data.{role}", problem)
        every, batches = getattr(trainer, "val_check_interval", None), pl_module.epoch_batches()  # none: it is a time
        if trainer.check_val_every_n_epoch is not None and isinstance(every, int) and every > batches:
            raise InputError(
                "trainer.val_check_interval",
                f"is {every}, more than the {batches} batches of an epoch; lower it, or set "
                "trainer.check_val_every_n_epoch to null to count on over epochs",
            )
