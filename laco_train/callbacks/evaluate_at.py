"""Measures the validation loss at chosen shares of a run's tokens, beside Lightning's own interval."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from laco_train.callbacks.curves import Curves
from laco_train.training.loss import Batch
from laco_train.training.module import CausalLM


def ends_step(trainer: Trainer, steps: set[int]) -> bool:
    """Whether the batch that is done now was the last one of an optimizer step among `steps`."""
    return trainer.global_step in steps and not trainer.fit_loop.epoch_loop._should_accumulate()


class EvaluateAt(Callback):
    """Measures once budget.evaluate_at says so, unless Lightning validates there or training ends there.

    Args:
        curves: measures and keeps the point; it must come before this among the Trainer's callbacks.
    """

    def __init__(self, curves: Curves):
        self.curves = curves
        self._steps: set[int] = set()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The length of the run is known."""
        assert isinstance(pl_module, CausalLM)
        self._steps = pl_module.steps_at(pl_module.budget.evaluate_at) - {pl_module.total_steps()}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Measure after the last batch of such a step."""
        loop = trainer.fit_loop.epoch_loop
        if not ends_step(trainer, self._steps):
            return
        if not loop._should_check_val_fx(trainer.fit_loop._data_fetcher):  # type: ignore[arg-type]
            self.curves.measure(trainer, pl_module)
