"""The table that ends a run."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer
from rich.console import Console
from rich.table import Table

from laco_train.callbacks.curves import Curves
from laco_train.callbacks.evaluate_tasks import EvaluateTasks
from laco_train.callbacks.layer_collapse import LayerCollapse
from laco_train.callbacks.memory import Memory
from laco_train.callbacks.samples import Samples
from laco_train.files import write_whole
from laco_train.training.module import CausalLM

_POINT = ("step", "tokens", "loss", "seconds")


def write_summary(
    collapse: LayerCollapse, curves: Curves, memory: Memory, tasks: EvaluateTasks, samples: Samples, trainer: Trainer
) -> None:
    """Keep the run's outcome as summary.json in its folder, for whoever compares runs; memory is that of rank 0."""
    plan, use, module = collapse.plan, curves.utilisation, trainer.lightning_module
    assert plan is not None and isinstance(module, CausalLM)
    speed = curves.tokens_per_second
    peak = max(use.earlier_peak, torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else None
    values = {
        "source": plan.source,
        "strategy": plan.strategy,
        "source_depth": plan.source_depth,
        "depth": plan.depth,
        "parameters": dataclasses.asdict(plan.parameters),
        "losses": {**collapse.losses, "trained": curves.validation[-1][2]},
        "validation": [dict(zip(_POINT, point, strict=True)) for point in curves.validation],
        "evaluation": [dataclasses.asdict(accuracy) for accuracy in tasks.found],
        "samples": {"prompts": list(samples.prompts), **samples.written},
        "data": trainer.datamodule.summary(),  # type: ignore[attr-defined]
        "steps": trainer.global_step,
        "refined_tokens": plan.refinement.tokens,
        "out_of_time": out_of_time(trainer, module),
        "tokens": curves.tokens,
        "search_seconds": plan.calibration.seconds if plan.calibration else 0.0,
        "training_seconds": curves.validation[-1][3],
        "tokens_per_second": speed,
        "flops_per_token": use.flops_per_token,
        "matrix_product_flops": use.rate or None,
        "mfu": None if speed is None else use.mfu(speed),
        "precision": str(trainer.precision),
        "kernels": str(module.kernels),
        "checkpointed_layers": module.checkpointed,
        "peak_gib": None if peak is None else peak / 2**30,
        "state_gib": None if memory.held is None else memory.held / 2**30,
    }
    path = Path(str(trainer.log_dir)) / "summary.json"
    write_whole(path, json.dumps(values, indent=1) + "\n")


def out_of_time(trainer: Trainer, module: CausalLM) -> bool:
    """Whether trainer.max_time ended the run before its last step."""
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
    left = [timer.time_remaining() for timer in timers]
    return trainer.global_step < module.total_steps() and any(time is not None and time <= 0 for time in left)


def print_summary(collapse: LayerCollapse, curves: Curves, trainer: Trainer, export: Path | None) -> None:
    """Print what the collapse cost, what training gave back, and where the results are."""
    plan, losses = collapse.plan, collapse.losses
    assert plan is not None
    trained = curves.validation[-1][2]
    table = Table(title="Layer Collapse", title_style="bold")
    for name in ("", "layers", "parameters", "validation loss", "perplexity"):
        table.add_column(name, justify="left" if not name else "right")
    rows = [
        ("original", plan.source_depth, plan.parameters.before, losses.get("original")),
        ("after collapse", plan.depth, plan.parameters.after, losses.get("collapsed")),
        ("after training", plan.depth, plan.parameters.after, trained),
    ]
    for name, depth, parameters, loss in rows:
        numbers = ("", "") if loss is None else (f"{loss:.4f}", _perplexity(loss))
        table.add_row(name, str(depth), f"{parameters:,}", *numbers)
    console = Console(width=100)
    console.print(table)
    effect = effect_of_training(losses, trained)
    if effect is not None:
        tokens = curves.tokens - plan.refinement.tokens
        console.print(f"Training on {tokens:,} tokens ({trainer.global_step} steps) {effect}", soft_wrap=True)
    if trainer.log_dir is not None:  # as in a fast_dev_run
        console.print(f"Run: {trainer.log_dir}   curves: tensorboard --logdir {trainer.log_dir}", soft_wrap=True)
    if export is not None:
        console.print(f'Model: {export}   load: AutoModelForCausalLM.from_pretrained("{export}")', soft_wrap=True)


def effect_of_training(losses: Mapping[str, float], trained: float) -> str | None:
    """What became of the validation loss, as the end of a sentence; None: nothing to speak of.

    Args:
        losses: nats per token of the "original", if it was measured, and of what was "collapsed" right before training.
        trained: that after training.
    """
    collapsed = losses["collapsed"]
    if round(trained, 4) > round(collapsed, 4):  # as the table shows them
        worse = f"made it worse: validation loss {trained:.4f}, but {collapsed:.4f} right after the collapse"
        return f"{worse}; lower model.optimizer.learning_rate, or name other text."
    if collapsed <= losses.get("original", math.inf) + 0.1:  # below a tenth of a nat the share says nothing
        return None
    share = (collapsed - trained) / (collapsed - losses["original"])
    return f"gave back {round(100 * share)}% of the loss that the collapse cost."


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):,.1f}" if loss < 20 else f"e^{loss:.0f}"
