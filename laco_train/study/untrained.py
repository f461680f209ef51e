"""A fit that ends before its first step: the collapse, and what it cost."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

UNTRAINED: dict[str, Any] = {"budget": {"max_tokens": 1, "evaluate_at": []}, "trainer": {"enable_checkpointing": False}}
"""What its recipe says: the optimizer's schedule needs a step, which is never taken."""
CALLBACK = "laco_train.study.untrained.StopBeforeTraining"


class StopBeforeTraining(Callback):
    """Ends training where it would start, once the losses of the original and the collapsed model are measured."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The loop looks at this before it takes a batch."""
        trainer.should_stop = True
