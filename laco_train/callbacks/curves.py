"""What a reader of TensorBoard sees beside Lightning's own: where curves start, tokens as an axis, speed, memory."""

import math
import time
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from laco_train.callbacks.clock import TrainingClock
from laco_train.callbacks.divergence import not_finite
from laco_train.callbacks.layer_collapse import LayerCollapse
from laco_train.callbacks.utilisation import Utilisation
from laco_train.training.interval import logs_after
from laco_train.training.loggers import log_to_all
from laco_train.training.loss import Batch, mean_loss
from laco_train.training.memory import peak_gib
from laco_train.training.module import CausalLM


class Curves(Callback):
    """Logs losses by steps and by tokens, the learning rate, the gradient norm, speed and peak memory.

    The loss of the original and the loss right after the collapse open the validation curve, so that a reader sees what
    the collapse cost and what training gave back.

    Args:
        collapse: has measured the losses that open the validation curve.
        utilisation: tells which share of the device's rate a speed is.

    Attributes:
        tokens: tokens trained on so far, over all devices, those of refinement before training included.
        validation: (step, tokens, loss, seconds) of every validation, the collapsed model first; see `seconds`.
        clock: runs while training does.
    """

    def __init__(self, collapse: LayerCollapse, utilisation: Utilisation):
        self.collapse = collapse
        self.utilisation = utilisation
        self.tokens = 0
        self.validation: list[tuple[int, int, float, float]] = []
        self.clock = TrainingClock()
        self._since: tuple[float, int] | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Mean speed of training, validation and the first batch aside; None for a run of one batch."""
        return self.clock.tokens / self.clock.seconds if self.clock.seconds else None

    @property
    def seconds(self) -> float:
        """Time that the tokens so far took at the mean speed: validation, checkpoints and compilation aside."""
        speed, refinement = (
            self.tokens_per_second,
            None if self.collapse.plan is None else self.collapse.plan.refinement,
        )
        before = (0, 0.0) if refinement is None else (refinement.tokens, refinement.seconds)
        return before[1] + (0.0 if speed is None else (self.tokens - before[0]) / speed)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the curves with what was measured before training."""
        self._since = None
        self.clock.reset()
        if not self.validation and "collapsed" in self.collapse.losses:
            assert isinstance(pl_module, CausalLM)
            self.tokens = pl_module.refined_tokens
            self._log_start(trainer)

    def _log_start(self, trainer: Trainer) -> None:
        collapsed = self.collapse.losses["collapsed"]
        self.validation.append((0, self.tokens, collapsed, self.seconds))
        values = {"val/loss": collapsed}
        values["val/perplexity"] = math.exp(min(collapsed, 700))
        log_to_all(trainer, values, 0)
        self.by_tokens(trainer, values)
        self._draw_original(trainer)

    def _draw_original(self, trainer: Trainer) -> None:
        # again at each validation: a single point would be no line to compare with
        if "original" in self.collapse.losses:
            values = {"val/loss_original": self.collapse.losses["original"]}
            log_to_all(trainer, values, trainer.global_step)
            self.by_tokens(trainer, values)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Let the clock run, the first batch aside, in which layers are compiled."""
        self.clock.start(self.tokens)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count tokens, and log at Lightning's interval."""
        self.tokens += batch["input_ids"].numel() * trainer.world_size
        self.clock.warmed(trainer.strategy.root_device)
        if self._since is None:
            self._since = (time.perf_counter(), self.tokens)
        # only here, where Lightning has logged too, is the loss read off the device
        if trainer.fit_loop.epoch_loop._should_accumulate() or not logs_after(trainer, trainer.global_step):
            return
        # Lightning has divided the loss by the number of accumulated batches
        values = {"train/loss": float(outputs["loss"]) * trainer.accumulate_grad_batches}
        began, tokens = self._since
        if self.tokens > tokens:
            speed = (self.tokens - tokens) / (time.perf_counter() - began)
            pl_module.log("train/tokens_per_second", speed)
            if (mfu := self.utilisation.mfu(speed)) is not None:
                pl_module.log("train/mfu", mfu)
        self._since = (time.perf_counter(), self.tokens)
        pl_module.log("train/tokens", float(self.tokens))
        pl_module.log("train/peak_gib", peak_gib(trainer.strategy.root_device))
        self.by_tokens(trainer, values)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Log the learning rate."""
        if not logs_after(trainer, trainer.global_step + 1):
            return
        pl_module.log("train/learning_rate", optimizer.param_groups[0]["lr"])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Time spent validating is no training time."""
        self.pause(trainer)

    def pause(self, trainer: Trainer) -> None:
        """What follows is no training, until the next batch."""
        self._since = None
        self.clock.stop(self.tokens, trainer.strategy.root_device)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the validation loss on the axis of tokens."""
        if trainer.sanity_checking or "val/loss" not in trainer.callback_metrics or trainer.state.fn != "fit":
            return
        values = {name: float(trainer.callback_metrics[name]) for name in ("val/loss", "val/perplexity")}
        self._add_point(trainer, values["val/loss"])
        self.by_tokens(trainer, values)
        self._draw_original(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the curve where training ended, if the last validation was earlier."""
        self.pause(trainer)
        if not self.validation or self.validation[-1][0] != trainer.global_step:
            self.measure(trainer, pl_module)

    def measure(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add a point to the validation curve where no loop of Lightning's validates; on all ranks.

        Raises:
            TrainingStopped: the loss is not finite.
        """
        self.pause(trainer)
        loader = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
        context = trainer.precision_plugin.val_step_context
        total = partial(trainer.strategy.reduce, reduce_op="sum")
        loss = mean_loss(pl_module.lm, loader, pl_module.device, context, total, pl_module.loss).loss  # type: ignore[arg-type]
        if not math.isfinite(loss):
            raise not_finite(trainer)
        self._add_point(trainer, loss)
        values = {"val/loss": loss, "val/perplexity": math.exp(min(loss, 700))}
        log_to_all(trainer, values, trainer.global_step)
        self.by_tokens(trainer, values)
        self._draw_original(trainer)

    def _add_point(self, trainer: Trainer, loss: float) -> None:
        # where few batches are timed yet, the mean speed may rise faster than the tokens
        earlier = self.validation[-1][3] if self.validation else 0.0
        self.validation.append((trainer.global_step, self.tokens, loss, max(earlier, self.seconds)))

    def by_tokens(self, trainer: Trainer, values: dict[str, float]) -> None:
        """Show `values`, by tag, on the axis of tokens."""
        if isinstance(trainer.logger, TensorBoardLogger) and trainer.is_global_zero:
            for name, value in values.items():
                trainer.logger.experiment.add_scalar(f"by_tokens/{name}", value, self.tokens)

    def state_dict(self) -> dict[str, Any]:
        """Counts and curve, so that a resumed run goes on with them."""
        points = [list(point) for point in self.validation]
        return {"tokens": self.tokens, "validation": points, "clock": self.clock.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See state_dict."""
        self.tokens = state_dict["tokens"]
        self.validation = [
            (int(step), int(tokens), float(loss), float(seconds))
            for step, tokens, loss, seconds in state_dict["validation"]
        ]
        self.clock.load_state_dict(state_dict["clock"])
