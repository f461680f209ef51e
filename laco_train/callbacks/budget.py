"""Ends a run by tokens, as if trainer.max_steps had been the step that reaches budget.max_tokens."""

from lightning.pytorch import Callback, LightningModule, Trainer

from laco_train.training.module import CausalLM


class StopAtBudget(Callback):
    """Sets the Trainer's max_steps once the number of devices is known, before anything reads it."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The data are open, and the optimizer with its schedule comes later; on resume this comes first too."""
        assert isinstance(pl_module, CausalLM)
        if stage == "fit" and pl_module.budget.max_tokens is not None:
            trainer.fit_loop.epoch_loop.max_steps = pl_module.total_steps()
