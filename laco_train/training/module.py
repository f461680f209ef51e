"""The LightningModule: loads a model, trains it by next-token loss, keeps in a checkpoint what can't be made again."""

import math
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanMetric
from transformers import PreTrainedModel

from laco_train.collapse import CollapsePlan, decoder_of
from laco_train.collapse.composition import from_the_first_model
from laco_train.errors import InputError
from laco_train.models import load_model
from laco_train.precision import weights_dtype
from laco_train.settings import BudgetSettings, ModelSettings, SpeedSettings
from laco_train.training.adapters import attach_lora
from laco_train.training.budget import Limits, run_steps, steps_at
from laco_train.training.checkpointing import measured_layers, optimizer_bytes
from laco_train.training.data import collate
from laco_train.training.distill import Distillation, distills
from laco_train.training.fused import PLAIN as PLAIN_KERNELS
from laco_train.training.fused import Kernels, Loss, choose
from laco_train.training.fused_distill import DistillStep, Trial, hastened
from laco_train.training.interval import logs_after
from laco_train.training.last_layers import train_last_layers
from laco_train.training.layers import arrange_layers
from laco_train.training.loggers import log_to_all
from laco_train.training.loss import Batch, base_of, causal_lm_loss, target_tokens
from laco_train.training.optim import adamw, warmup_cosine
from laco_train.training.parallel import distribute, gathered_bytes, keep_gathered, skeleton
from laco_train.training.skipping import SkippedSteps, guard_step
from laco_train.training.teacher import Place, make_teacher

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
        seed: of the optimizer's rounding.

    Attributes:
        plan: of the collapse; LayerCollapse leaves it here in a run.
        skipped: steps left out, as their gradients were not finite.
        kernels: chosen at the start of a fit.
        loss: of a batch, by those kernels.
        checkpointed: layers that recompute their activations, chosen likewise.
    """

    strict_loading = False  # a checkpoint may hold what trains alone; on_load_checkpoint checks the keys itself

    def __init__(
        self,
        settings: ModelSettings,
        dtype: torch.dtype,
        speed: SpeedSettings = PLAIN,
        budget: BudgetSettings = NO_LIMIT,
        seed: int = 0,
    ):
        super().__init__()
        self.settings = settings
        self.speed = speed
        self.budget = budget
        self.seed = seed
        self.weights_dtype = dtype
        self.model: PreTrainedModel | PeftModel | None = None
        # by default a batch whose loss is NaN is left out, and "disable" forgets weights (torchmetrics 1.9)
        self.validation_loss = MeanMetric(nan_strategy=math.inf)
        self._exact_buffers: dict[str, Tensor] = {}
        self.skipped = SkippedSteps()
        self.kernels: Kernels = PLAIN_KERNELS
        self.loss: Loss = causal_lm_loss
        self.checkpointed = 0
        self.plan: CollapsePlan | None = None
        self._distillation: Distillation | None = None
        self._distill_step: DistillStep | None = None  # the fastest way to it

    @property
    def lm(self) -> PreTrainedModel | PeftModel:
        """The model, once `configure_model` has run."""
        assert self.model is not None, "configure_model has not run"
        return self.model

    def load(self) -> None:
        """Read the weights, on rank 0; other ranks build the same model without them. A second call changes nothing."""
        if self.model is None:
            s = self.settings
            read = load_model if self._trainer is None or self.trainer.is_global_zero else skeleton
            self.model = read(s.source, dtype=self.weights_dtype, trust_remote_code=s.trust_remote_code)

    def configure_model(self) -> None:
        """Lightning calls it after every setup hook, so after the collapse: hand the weights to all ranks."""
        self.load()
        if self._trainer is not None and torch.distributed.is_initialized():
            distribute(self.lm, self.trainer.strategy, str(self.trainer.precision))

    def setup(self, stage: str) -> None:
        """Attach adapters, freeze, bring in the teacher: after the callbacks' setup and so after the collapse."""
        self.load()
        if self.settings.method == "lora" and not isinstance(self.model, PeftModel):
            self.model = attach_lora(self.lm, self.settings.lora)  # type: ignore[arg-type]
        if self.settings.method == "last_layers":
            train_last_layers(self.lm, self.settings.last_layers)  # type: ignore[arg-type]
        self._exact_buffers = {
            name: buffer.detach().clone() for name, buffer in self.lm.named_buffers() if buffer.is_floating_point()
        }
        if stage == "fit" and self.plan is not None and self._distillation is None and distills(self.settings.distill):
            self._distillation = self._with_teacher(self.plan)

    def _with_teacher(self, plan: CollapsePlan) -> Distillation:
        trainer, s = self.trainer, self.settings
        precision = str(trainer.precision)
        rounded = weights_dtype("auto", precision)  # what a -true precision makes of the student
        dtype = self.weights_dtype if rounded == torch.float32 else rounded
        place = Place(trainer.strategy.root_device, dtype, precision, trainer.precision_plugin.val_step_context)
        data = trainer.datamodule  # type: ignore[attr-defined]
        whole = from_the_first_model(plan, s.source)
        if s.distill.teacher == whole.source:  # not the model that was collapsed last, but the one before all rounds
            plan = whole
        return Distillation(s.distill, make_teacher(s, plan.lineage, plan.source_depth, data, place))

    def _undo_casts(self) -> None:
        self.validation_loss.set_dtype(torch.float32)  # sums of thousands of tokens don't fit bfloat16
        # Lightning's true-precision plugins cast rotary frequencies too, which from_pretrained keeps in float32
        for name, exact in self._exact_buffers.items():
            owner, _, leaf = name.rpartition(".")
            module = self.lm.get_submodule(owner)
            if module._buffers[leaf] is not None and module._buffers[leaf].dtype != exact.dtype:  # type: ignore[union-attr]
                module._buffers[leaf] = exact.to(self.device)

    def on_fit_start(self) -> None:
        """Undo the precision plugin's casts; training mode, as from_pretrained leaves eval mode; kernels."""
        self._undo_casts()
        self.lm.train()
        self._choose_kernels()
        self.checkpointed = self._choose_checkpointing()

    def _choose_kernels(self) -> None:
        trainer: Any = self.trainer
        probe = self._on_device(collate(trainer.datamodule.validation_blocks.select(range(1))))
        context = trainer.precision_plugin.train_step_context

        def chosen(model: nn.Module) -> tuple[Kernels, Loss]:
            return choose(model, self.speed, trainer.strategy, probe, context)

        self.kernels, self.loss = chosen(self.lm)
        if self._distillation is not None:
            trial = Trial(self.lm, self.kernels, probe, context)
            self._distill_step, slow = hastened(self._distillation, trial, lambda teacher: chosen(teacher)[0])
            if self.kernels != PLAIN_KERNELS:
                self.kernels = replace(self.kernels, reasons=(*self.kernels.reasons, *slow))

    def _choose_checkpointing(self) -> int:
        """Layers that recompute."""
        trainer, device = self.trainer, self.trainer.strategy.root_device
        depth = len(decoder_of(base_of(self.lm)).stack)
        layers = 0 if self.speed.checkpointing == "none" or device.type != "cuda" else depth
        if self.speed.checkpointing == "all":
            layers = depth
        elif layers:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            rows = data.train_blocks.select(range(data.settings.batch_size))
            batch = self._on_device(data.on_before_batch_transfer(collate(rows), 0))

            def forward() -> Tensor:
                with trainer.precision_plugin.train_step_context():
                    return self._training_loss(batch)

            o = self.settings.optimizer
            states = optimizer_bytes(self.lm, eight_bit=o.eight_bit, exact=o.small_updates == "float32")
            batches = trainer.accumulate_grad_batches
            layers, left = measured_layers(self.lm, self._arrange, forward, states, batches, device)
            short = left < gathered_bytes(self.lm)
            # every rank as the one that has the least room
            most = trainer.strategy.reduce(torch.tensor([layers, short], device=device), reduce_op="max").tolist()
            layers = int(most[0])
            if not most[1]:
                keep_gathered(self.lm)
        self._arrange(layers)
        return layers

    def _arrange(self, recompute: int) -> None:
        arrange_layers(self.lm, compiled=self.kernels.compiled, recompute=recompute)

    def _on_device(self, batch: Batch) -> Batch:
        return {name: value.to(self.device) for name, value in batch.items()}

    def on_validation_start(self) -> None:
        """Undo the precision plugin's cast of buffers and sums, when validating alone."""
        self._undo_casts()

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Loss of one batch, nats per target token, and what is learned from the teacher."""
        if self._distill_step is not None:
            return self._distilled(self._distill_step, batch)
        loss = self.loss(self.lm, batch)
        self._log_at_interval({"train/loss": loss})
        return loss

    def _log_at_interval(self, values: dict[str, Tensor]) -> None:
        # Lightning handles every value at every step; prog_bar=True would read it off the device too
        if logs_after(self.trainer, self.trainer.global_step + 1):
            self.log_dict(values)

    def _training_loss(self, batch: Batch) -> Tensor:
        if self._distill_step is not None:
            return self._distill_step(self.lm, batch).total
        return self.loss(self.lm, batch)

    def _distilled(self, step: DistillStep, batch: Batch) -> Tensor:
        loss = step(self.lm, batch)
        self._log_at_interval(
            {
                "train/loss": loss.total,
                "train/next_token_loss": loss.next_token,
                "train/distill_logits": loss.logits,
                "train/distill_hidden": loss.hidden,
            }
        )
        return loss.total

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Gather the loss, weighted by target tokens."""
        tokens = target_tokens(batch)
        loss = self.loss(self.lm, batch)  # without a target too: a sharded model needs every rank in every pass
        if tokens > 0:
            self.validation_loss.update(loss.detach().float(), tokens)

    def on_validation_epoch_end(self) -> None:
        """Log val/loss and its exponential, in a fit at the number of steps done: Lightning would be one behind.

        A metric named step would set that right too, but ModelCheckpoint would name its files by it.
        """
        loss = self.validation_loss.compute()
        self.validation_loss.reset()
        values = {"val/loss": loss, "val/perplexity": loss.exp()}
        fits = self.trainer.state.fn == "fit"
        self.log("val/loss", loss, prog_bar=True, logger=not fits)
        self.log("val/perplexity", values["val/perplexity"], logger=not fits)
        if fits and not self.trainer.sanity_checking:
            log_to_all(self.trainer, {name: float(value) for name, value in values.items()}, self.trainer.global_step)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with warm-up and cosine over the length of the run."""
        optimizer = adamw(self.lm, self.settings.optimizer, self.seed)
        schedule = warmup_cosine(optimizer, self.settings.schedule, self.total_steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip by norm inside the optimizer's step, and leave the step out where gradients are not finite.

        Raises:
            InputError: clipping by value.
        """
        if gradient_clip_val and gradient_clip_algorithm not in (None, "norm"):
            raise InputError("trainer.gradient_clip_algorithm", "must be norm, to which gradients are clipped here")
        norm = guard_step(optimizer, gradient_clip_val, self.skipped)
        self._log_at_interval({"train/gradient_norm": norm})

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Free the gradients after the step: Lightning would hold them through the next forward pass."""
        super().optimizer_step(*args, **kwargs)
        self.zero_grad(set_to_none=True)

    @property
    def refined_tokens(self) -> int:
        """Tokens that refinement took before training; budget.max_tokens counts them in."""
        refinement = None if self.plan is None else self.plan.refinement
        return 0 if refinement is None else refinement.tokens

    def total_steps(self) -> int:
        """Optimizer steps of the whole run, after any refinement.

        Not ``trainer.estimated_stepping_batches``, which builds the loader early and so loses its restored position.

        Raises:
            InputError: the recipe sets no end, or refinement takes all tokens.
        """
        trainer, most = self.trainer, self.budget.max_tokens
        if most is not None:
            most -= self.refined_tokens
            if most <= 0:
                raise InputError("collapse.refine.tokens", "is all of budget.max_tokens, which it counts in; lower it")
        limits = Limits(trainer.max_steps, trainer.max_epochs, most)
        steps = run_steps(limits, self.batch_tokens(), self.epoch_batches(), trainer.accumulate_grad_batches)
        if steps is None:
            raise InputError(
                "trainer.max_steps",
                "give it, trainer.max_epochs or budget.max_tokens: the schedule spans the whole run",
            )
        return steps

    def epoch_batches(self) -> int:
        """Batches of an epoch on each device."""
        batches: int = self.trainer.datamodule.batches_per_epoch  # type: ignore[attr-defined]
        limit = self.trainer.limit_train_batches
        return min(batches, limit) if isinstance(limit, int) else int(batches * limit)

    def steps_at(self, shares: list[float]) -> set[int]:
        """Optimizer steps nearest to these shares of the run's tokens, those of refinement included; 1 or more each.

        A share that lies within the refinement has none.
        """
        steps = self.total_steps()
        before = self.refined_tokens / (self.batch_tokens() * self.trainer.accumulate_grad_batches)
        return steps_at(shares, steps, before)

    def batch_tokens(self) -> int:
        """Tokens of a batch over all devices, padding included."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        tokens: int = data.tokens_per_epoch // data.batches_per_epoch
        return tokens

    def trainable_names(self) -> set[str]:
        """State-dict names of what trains, and so of what a checkpoint holds unless all does."""
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """All weights, or where only some train those alone: source and plan give the rest."""
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
        if "state_dict" not in checkpoint:  # ModelParallelStrategy has loaded the weights by itself
            return
        expected, found = set(self.state_dict()), set(checkpoint["state_dict"])
        if expected != found:
            odd = sorted(expected ^ found)[0]
            raise InputError(
                "--ckpt_path",
                f"its weights are not those of this recipe's model: {len(expected ^ found)} differ, first {odd}; "
                "resume with the recipe of its run",
            )
