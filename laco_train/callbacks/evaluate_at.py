"""Measures the validation loss at chosen shares of a run's tokens, beside Lightning's own interval."""

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from laco_train.callbacks.curves import Curves
from laco_train.training.loss import Batch
from laco_train.training.module import CausalLM


def steps_at(shares: list[float], steps: int) -> set[int]:
    """Optimizer steps, of a run of `steps`, that reach these shares of its tokens; 1 or more each."""
    # 0.07 * 100 is a little above 7
    return {max(1, math.ceil(round(share * steps, 6))) for share in shares}


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
        steps = pl_module.total_steps()
        self._steps = steps_at(pl_module.budget.evaluate_at, steps) - {steps}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Measure after the last batch of such a step."""
        loop = trainer.fit_loop.epoch_loop
        if trainer.global_step not in self._steps or loop._should_accumulate():
            return
        if not loop._should_check_val_fx(trainer.fit_loop._data_fetcher):  # type: ignore[arg-type]
            self.curves.measure(trainer, pl_module)
