"""The LightningModule: loads a model, trains it by next-token loss, keeps in a checkpoint what can't be made again."""

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from peft import PeftModel
from torch import Tensor, nn
from torchmetrics import MeanMetric
from transformers import PreTrainedModel

from laco_train.errors import InputError
from laco_train.models import load_model
from laco_train.settings import BudgetSettings, ModelSettings, SpeedSettings
from laco_train.training.adapters import attach_lora
from laco_train.training.loss import Batch, causal_lm_loss, target_tokens
from laco_train.training.optim import adamw, warmup_cosine

# Under this key a checkpoint holds the plan, the model section and the losses measured before training.
CHECKPOINT_KEY = "laco_train"
PLAIN = SpeedSettings(kernels="plain", checkpointing="none")
NO_LIMIT = BudgetSettings()


class CausalLM(LightningModule):
    """A causal language model under training.

    Args:
        settings: the recipe's model section.
        dtype: type of the weights.
        speed: the recipe's speed section.
        budget: the recipe's budget section.
    """

    strict_loading = False  # a LoRA checkpoint holds the adapters alone; on_load_checkpoint checks the keys itself

    def __init__(
        self,
        settings: ModelSettings,
        dtype: torch.dtype,
        speed: SpeedSettings = PLAIN,
        budget: BudgetSettings = NO_LIMIT,
    ):
        super().__init__()
        self.settings = settings
        self.speed = speed
        self.budget = budget
        self.weights_dtype = dtype
        self.model: PreTrainedModel | PeftModel | None = None
        # by default a batch whose loss is NaN is left out, and "disable" forgets weights (torchmetrics 1.9)
        self.validation_loss = MeanMetric(nan_strategy=math.inf)
        self._exact_buffers: dict[str, Tensor] = {}

    @property
    def lm(self) -> PreTrainedModel | PeftModel:
        """The model, once `configure_model` has run."""
        assert self.model is not None, "configure_model has not run"
        return self.model

    def configure_model(self) -> None:
        """Load the weights; a second call changes nothing, as LayerCollapse calls it before Lightning does."""
        if self.model is None:
            s = self.settings
            self.model = load_model(s.source, dtype=self.weights_dtype, trust_remote_code=s.trust_remote_code)

    def setup(self, stage: str) -> None:
        """Attach adapters, after the callbacks' setup and so after the collapse."""
        self.configure_model()
        if self.settings.method == "lora" and not isinstance(self.model, PeftModel):
            self.model = attach_lora(self.lm, self.settings.lora)  # type: ignore[arg-type]
        self._exact_buffers = {
            name: buffer.detach().clone() for name, buffer in self.lm.named_buffers() if buffer.is_floating_point()
        }

    def _restore_buffers(self) -> None:
        # Lightning's true-precision plugins cast rotary frequencies too, which from_pretrained keeps in float32
        for name, exact in self._exact_buffers.items():
            owner, _, leaf = name.rpartition(".")
            module = self.lm.get_submodule(owner)
            if module._buffers[leaf] is not None and module._buffers[leaf].dtype != exact.dtype:  # type: ignore[union-attr]
                module._buffers[leaf] = exact.to(self.device)

    def on_fit_start(self) -> None:
        """Undo the precision plugin's cast of buffers; training mode, as from_pretrained leaves eval mode."""
        self._restore_buffers()
        self.lm.train()

    def on_validation_start(self) -> None:
        """Undo the precision plugin's cast of buffers, when validating alone."""
        self._restore_buffers()

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Loss of one batch, nats per target token."""
        loss = causal_lm_loss(self.lm, batch)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Gather the loss, weighted by target tokens."""
        tokens = target_tokens(batch)
        if tokens > 0:
            self.validation_loss.update(causal_lm_loss(self.lm, batch).detach().float(), tokens)

    def on_validation_epoch_end(self) -> None:
        """Log val/loss and its exponential, in a fit at the number of steps done; Lightning's own is one behind."""
        if self.trainer.state.fn == "fit":
            self.log("step", float(self.trainer.global_step))
        loss = self.validation_loss.compute()
        self.validation_loss.reset()
        self.log("val/loss", loss, prog_bar=True)
        self.log("val/perplexity", loss.exp())

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with warm-up and cosine over the length of the run."""
        optimizer = adamw(self.lm, self.settings.optimizer)
        schedule = warmup_cosine(optimizer, self.settings.schedule, self.total_steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def total_steps(self) -> int:
        """Optimizer steps of the whole run.

        Not ``trainer.estimated_stepping_batches``, which builds the loader early and so loses its restored position.

        Raises:
            InputError: the recipe sets no end.
        """
        trainer = self.trainer
        batches: int = trainer.datamodule.batches_per_epoch  # type: ignore[attr-defined]
        limit = trainer.limit_train_batches
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        steps = [trainer.max_steps] if trainer.max_steps > 0 else []
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            steps.append(trainer.max_epochs * -(-batches // trainer.accumulate_grad_batches))
        if not steps:
            raise InputError("trainer.max_steps", "give it or trainer.max_epochs: the schedule spans the whole run")
        return min(steps)

    def trainable_names(self) -> set[str]:
        """State-dict names of what trains, and so of what a LoRA checkpoint holds."""
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """All weights, or with LoRA the adapters alone: source and plan give the rest."""
        state = nn.Module.state_dict(self, *args, **kwargs)
        if self.settings.method == "full":
            return state
        names = self.trainable_names()
        return {name: value for name, value in state.items() if name in names}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint whose weights are not exactly those of this model.

        Raises:
            InputError: it was written under another method, or for another model.
        """
        expected, found = set(self.state_dict()), set(checkpoint["state_dict"])
        if expected != found:
            odd = sorted(expected ^ found)[0]
            raise InputError(
                "--ckpt_path",
                f"its weights are not those of this recipe's model: {len(expected ^ found)} differ, first {odd}; "
                "resume with the recipe of its run",
            )
