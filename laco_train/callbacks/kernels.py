"""Says which kernels a run trains with, and how many layers recompute."""

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from laco_train.collapse import decoder_of
from laco_train.training.loss import base_of
from laco_train.training.module import CausalLM


class ReportKernels(Callback):
    """Prints the choice and shows it in TensorBoard."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The module has chosen, in its on_fit_start, which comes after that of callbacks."""
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, CausalLM)
        depth = len(decoder_of(base_of(pl_module.lm)).stack)
        line = f"{pl_module.kernels}; {pl_module.checkpointed} of {depth} layers recompute."
        print(f"Kernels: {line}", flush=True)
        if isinstance(trainer.logger, TensorBoardLogger):
            trainer.logger.experiment.add_text("kernels", line, trainer.global_step)
