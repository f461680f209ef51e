"""Collapses the model before the optimizer exists, and measures what that cost."""

import dataclasses
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from laco_train.collapse import CollapsePlan, apply_plan, collapse_model
from laco_train.collapse.report import describe, similarity_figure
from laco_train.models import load_tokenizer
from laco_train.progress import bar, search_progress
from laco_train.settings import CollapseSettings
from laco_train.training.loss import MeanLoss, mean_loss
from laco_train.training.module import CHECKPOINT_KEY, CausalLM


class LayerCollapse(Callback):
    """Layer Collapse at the start of a run.

    It works in `setup`, where the optimizer does not exist yet; in `on_fit_start` it would already hold parameters of
    layers that go. A resumed run gets its plan from the checkpoint and never searches again.

    Args:
        settings: the recipe's collapse section.
        plan: the plan of the run being resumed.
        losses: losses measured when that run began, by name.
    """

    def __init__(
        self, settings: CollapseSettings, plan: CollapsePlan | None = None, losses: dict[str, float] | None = None
    ):
        self.settings = settings
        self.plan = plan
        self.losses: dict[str, float] = dict(losses or {})
        self._done = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load the model, collapse it, save the plan in the run's folder."""
        if self._done:
            return
        assert isinstance(pl_module, CausalLM)
        pl_module.configure_model()
        model: Any = pl_module.lm
        model.to(trainer.strategy.root_device)
        resumed = self.plan is not None
        if self.plan is not None:
            apply_plan(model, self.plan)
        else:
            if stage == "fit":
                self.losses["original"] = self._measure(trainer, pl_module, "original model").loss
            self.plan = self._collapse(pl_module)
            if stage == "fit":
                self.losses["collapsed"] = self._measure(trainer, pl_module, "collapsed model").loss
        self._done = True
        if stage == "fit" and trainer.is_global_zero:
            self._record(trainer, resumed)

    def _collapse(self, pl_module: CausalLM) -> CollapsePlan:
        s = pl_module.settings
        tokenizer = load_tokenizer(s.source, trust_remote_code=s.trust_remote_code)
        with search_progress(self.settings.lowest_layer) as on_candidate:
            _, plan = collapse_model(
                pl_module.lm,  # type: ignore[arg-type]
                tokenizer,
                self.settings,
                source=s.source,
                on_candidate=on_candidate,
            )
        for line in describe(plan):
            print(line, flush=True)
        return plan

    def _measure(self, trainer: Trainer, pl_module: CausalLM, what: str) -> MeanLoss:
        loader = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
        with bar() as progress:
            batches = progress.track(loader, description=f"Validation loss of the {what}")
            precision = trainer.precision_plugin
            result = mean_loss(pl_module.lm, batches, trainer.strategy.root_device, precision.val_step_context)
        print(f"Validation loss of the {what}: {result.loss:.4f} nats per token ({result.tokens:,} tokens)", flush=True)
        return result

    def _record(self, trainer: Trainer, resumed: bool) -> None:
        assert self.plan is not None
        if trainer.log_dir is not None:
            self.plan.save(f"{trainer.log_dir}/collapse_plan.json")
        if resumed or not isinstance(trainer.logger, TensorBoardLogger):
            return
        writer = trainer.logger.experiment
        writer.add_text("collapse/plan", "\n".join(f"    {line}" for line in describe(self.plan)), 0)
        if self.plan.candidates:
            writer.add_figure("collapse/similarity", similarity_figure(self.plan), 0)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the plan, so that a resume and an export need no search."""
        assert self.plan is not None
        assert isinstance(pl_module, CausalLM)
        checkpoint[CHECKPOINT_KEY] = {
            "plan": self.plan.to_dict(),
            "model": dataclasses.asdict(pl_module.settings),
            "dtype": str(pl_module.weights_dtype).removeprefix("torch."),
            "losses": dict(self.losses),
        }
