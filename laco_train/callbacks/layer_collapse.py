"""Collapses the model before the optimizer exists, and measures what that cost."""

import copy
import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from laco_train.collapse import CollapsePlan, apply_plan, collapse_model, decoder_of, placement_for
from laco_train.collapse.decoder import collapsible, keep_layers
from laco_train.collapse.report import describe, similarity_figure
from laco_train.collapse.similarity import read_calibration
from laco_train.collapse.unmerged import refuse_nothing_merged
from laco_train.errors import InputError
from laco_train.models import load_tokenizer
from laco_train.progress import bar, search_progress
from laco_train.refine import Place, leading_batches, refine, refining
from laco_train.settings import CollapseSettings
from laco_train.training.documents import keeps_documents_apart
from laco_train.training.loss import Batch, mean_loss
from laco_train.training.module import CHECKPOINT_KEY, CausalLM
from laco_train.training.overlap import occurring, text_of
from laco_train.training.parallel import on_rank_zero
from laco_train.training.scratch import draw_weights
from laco_train.training.told import told_of_run


class LayerCollapse(Callback):
    """Layer Collapse at the start of a run.

    It works in `setup`, where the optimizer does not exist yet; in `on_fit_start` it would already hold parameters of
    layers that go. A resumed run gets its plan from the checkpoint and never searches again. Nothing is written before
    `on_fit_start`, so that input found bad until then leaves no trace.

    Args:
        settings: the recipe's collapse section.
        recipe: the recipe's name, for the checkpoint.
        plan: the plan of the run being resumed.
        losses: losses measured when that run began, by name.
        seed: of the weights, where model.from_scratch draws them anew.
        on_model: called on rank 0 of a fit, with "original" and "collapsed", while that model is whole in memory; not
            with an original that is larger than the device.
    """

    def __init__(
        self,
        settings: CollapseSettings,
        recipe: str = "",
        plan: CollapsePlan | None = None,
        losses: dict[str, float] | None = None,
        seed: int = 0,
        on_model: Callable[[Literal["original", "collapsed"], PreTrainedModel], None] | None = None,
    ):
        self.on_model = on_model
        self.settings = settings
        self.recipe = recipe
        self.seed = seed
        self.plan = plan
        self.losses: dict[str, float] = dict(losses or {})
        self._resumed = plan is not None
        self._done = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load the model and collapse it, on rank 0; the other ranks cut an empty one to the same layers."""
        if self._done:
            return
        assert isinstance(pl_module, CausalLM)
        self.plan, self.losses = on_rank_zero(trainer, partial(self._collapsed, trainer, pl_module, stage))
        if not trainer.is_global_zero:
            pl_module.load()
            keep_layers(collapsible(pl_module.lm), [layer[0] for layer in self.plan.lineage])  # type: ignore[arg-type]
        pl_module.plan = self.plan
        self._done = True

    def _collapsed(self, trainer: Trainer, pl_module: CausalLM, stage: str) -> tuple[CollapsePlan, dict[str, float]]:
        pl_module.load()
        model: Any = pl_module.lm
        if self.plan is not None:
            apply_plan(model, self.plan, weights_follow=True)
            return self.plan, self.losses
        if stage == "fit" and not keeps_documents_apart(model):
            print(
                f"Warning: attention of {model.config.model_type} does not heed where documents begin, "
                "so that those packed into a block see each other.",
                flush=True,
            )
        device = trainer.strategy.root_device
        losses: dict[str, float] = {}
        streamed = placement_for(decoder_of(model), self.settings, device) == "stream"
        looks = self.on_model if stage == "fit" else None
        if stage == "fit" and streamed:
            print("The original is larger than the device: its validation loss is not measured.", flush=True)
        elif stage == "fit":
            model.to(device)
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            losses["original"] = self._measure(trainer, pl_module, "original", data.all_validation())
            if looks is not None:
                looks("original", model)
        refines = self.settings.refine.tokens > 0 and not pl_module.settings.from_scratch
        if refines and streamed:
            raise InputError(
                "collapse.refine.tokens", "needs the original on the device, which is smaller; set it to 0"
            )
        original = copy.deepcopy(model) if refines else None
        plan = self._search(pl_module, device)
        if stage == "fit":
            refuse_nothing_merged(plan)
        if original is not None:
            plan = self._refined(trainer, pl_module, original, plan)
        if pl_module.settings.from_scratch:
            model.to("cpu")
            draw_weights(model, self.seed)
            print("All weights are drawn anew: only the shape is that of the collapsed model.", flush=True)
        if looks is not None:
            if not streamed:
                model.to(device)
            looks("collapsed", model)
        if stage == "fit" and plan.calibration is not None:
            self._report_overlap(trainer, pl_module)
        return plan, losses

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what is left, where it trains: every rank its share of the blocks."""
        if self._resumed:
            return
        assert isinstance(pl_module, CausalLM)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        total = partial(trainer.strategy.reduce, reduce_op="sum")
        self.losses["collapsed"] = self._measure(trainer, pl_module, "collapsed", data.val_dataloader(), total)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the plan in the run's folder and show it in TensorBoard."""
        assert self.plan is not None
        log_dir = trainer.log_dir
        if not trainer.is_global_zero:
            return
        if log_dir is not None:
            self.plan.save(Path(log_dir) / "collapse_plan.json")
        if self._resumed or not isinstance(trainer.logger, TensorBoardLogger):
            return
        writer = trainer.logger.experiment
        writer.add_text("collapse/plan", "\n".join(f"    {line}" for line in describe(self.plan)), 0)
        if self.plan.candidates:
            writer.add_figure("collapse/similarity", similarity_figure(self.plan), 0)

    def _search(self, pl_module: CausalLM, device: torch.device) -> CollapsePlan:
        s = pl_module.settings
        tokenizer = load_tokenizer(s.source, trust_remote_code=s.trust_remote_code)
        with search_progress(self.settings) as on_candidate:
            _, plan = collapse_model(
                pl_module.lm,  # type: ignore[arg-type]
                tokenizer,
                self.settings,
                source=s.source,
                device=device,
                on_candidate=on_candidate,
            )
        for line in describe(plan):
            print(line, flush=True)
        return plan

    def _refined(
        self, trainer: Trainer, pl_module: CausalLM, original: PreTrainedModel, plan: CollapsePlan
    ) -> CollapsePlan:
        r, data = self.settings.refine, trainer.datamodule  # type: ignore[attr-defined]
        device, context = trainer.strategy.root_device, trainer.precision_plugin.train_step_context
        collapsed: Any = pl_module.lm
        alone = f", {100 * r.windows:.0f}% of them layer by layer" if r.windows else ""
        print(f"Refining: {r.tokens:,} tokens{alone}", flush=True)
        models = (collapsed, original)
        for model in models:
            model.to(device)  # type: ignore[arg-type]  # Transformers wraps to() for bitsandbytes
        with refining(*models, pl_module.speed, trainer.strategy, data, context, together=r.windows < 1) as divergence:
            batches = leading_batches(data, r)
            plan = refine(original, collapsed, plan, batches, r, Place(device, context, divergence))
        print(f"Refined in {plan.refinement.seconds:.1f} s", flush=True)
        return plan

    def _report_overlap(self, trainer: Trainer, pl_module: CausalLM) -> None:
        s = pl_module.settings
        tokenizer = load_tokenizer(s.source, trust_remote_code=s.trust_remote_code)
        blocks = trainer.datamodule.validation_blocks["input_ids"]  # type: ignore[attr-defined]
        found = occurring(read_calibration(self.settings.calibration), text_of(blocks, tokenizer))
        if found:
            print(
                f"Warning: {len(found)} calibration samples also occur in the validation data, "
                f"so that its losses flatter the choice of layers: {found[0][:60]!r}",
                flush=True,
            )

    def _measure(
        self,
        trainer: Trainer,
        pl_module: CausalLM,
        which: str,
        loader: Iterable[Batch],
        total_over_ranks: Callable[[Tensor], Tensor] | None = None,
    ) -> float:
        what = f"Validation loss of the {which} model"
        context, device = trainer.precision_plugin.val_step_context, trainer.strategy.root_device
        with bar(disable=not trainer.is_global_zero) as progress:
            batches = progress.track(loader, description=what)
            result = mean_loss(pl_module.lm, batches, device, context, total_over_ranks)
        if trainer.is_global_zero:
            print(f"{what}: {result.loss:.4f} nats per token ({result.tokens:,} tokens)", flush=True)
        return result.loss

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the plan, so that a resume and an export need no search."""
        assert self.plan is not None
        assert isinstance(pl_module, CausalLM)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        checkpoint[CHECKPOINT_KEY] = {
            "plan": self.plan.to_dict(),
            "model": dataclasses.asdict(pl_module.settings),
            "dtype": str(pl_module.weights_dtype).removeprefix("torch."),
            "losses": dict(self.losses),
            "recipe": self.recipe,
            "sharded": isinstance(pl_module.lm, FSDPModule),
            "data": told_of_run(data.summary(), data.settings, pl_module.settings),
        }
