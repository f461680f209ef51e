"""What a training checkpoint says beside weights, read without running any code from it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from transformers import PreTrainedTokenizerBase

from laco_train.checks import check_model
from laco_train.collapse import CollapsePlan, apply_plan
from laco_train.errors import InputError
from laco_train.evaluation.record import Accuracy
from laco_train.models import load_tokenizer
from laco_train.precision import named_dtype
from laco_train.settings import DistillSettings, LoraSettings, ModelSettings, OptimizerSettings, ScheduleSettings
from laco_train.training.checkpoint_io import broken_records, broken_shards, why_unreadable
from laco_train.training.module import CHECKPOINT_KEY, CausalLM
from laco_train.training.sharded import is_sharded, read_sharded


@dataclass(frozen=True)
class TrainingCheckpoint:
    """A checkpoint that `fit` wrote.

    Attributes:
        path: its file, or folder if it is sharded.
        plan: the collapse of its run.
        model: the recipe's model section.
        dtype: type of its weights.
        losses: nats per token, by name.
        recipe: name of the recipe of its run.
        data: what its run was trained on, by role.
        steps: optimizer steps done.
        tokens: tokens trained on.
        accuracies: on tasks, as far as its run had measured them.
        sharded: whether its run was under ModelParallelStrategy, which numbers the optimizer's state in its own way.
        state_dict: weights, on the CPU.
    """

    path: Path
    plan: CollapsePlan
    model: ModelSettings
    dtype: torch.dtype
    losses: dict[str, float]
    recipe: str
    data: dict[str, Any]
    steps: int
    tokens: int
    accuracies: tuple[Accuracy, ...]
    sharded: bool
    state_dict: Mapping[str, torch.Tensor]


def read_checkpoint(path: Path, key: str = "--checkpoint") -> TrainingCheckpoint:
    """Read `path` with weights_only, its tensors mapped rather than loaded.

    Args:
        path: a file that `fit` wrote, or the folder of a sharded checkpoint.
        key: the option that named it.

    Raises:
        InputError: missing, cut short, or not written by fit.
    """
    sharded = is_sharded(path)
    if not os.path.isfile(path) and not sharded:
        raise InputError(key, f"no file {str(path)!r}; name a .ckpt under a run's checkpoints folder")
    if broken := broken_shards(path) if sharded else broken_records(path):  # torch looks at no checksum
        raise InputError(key, f"{path} is damaged or no checkpoint of fit ({broken}); name another .ckpt")
    try:
        if sharded:
            values: Any = read_sharded(path, key)
        else:
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except InputError:
        raise
    except Exception as error:  # what unpickling raises over other bytes than those written has no end
        reason = why_unreadable(path, error)
        raise InputError(key, f"{path} is damaged or no checkpoint of fit ({reason}); name another .ckpt") from None
    if not isinstance(values, dict) or not isinstance(values.get(CHECKPOINT_KEY), dict):
        raise InputError(key, f"{path} was not written by laco_train fit; name a .ckpt that was")
    try:
        return _from_values(values, path)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:  # InputError too
        problem = f"is damaged or of another release of laco_train ({type(error).__name__}: {error})"
        raise InputError(key, f"{path} {problem}; name another .ckpt") from None


def _from_values(values: dict[str, Any], path: Path) -> TrainingCheckpoint:
    ours: dict[str, Any] = values[CHECKPOINT_KEY]
    callbacks = values.get("callbacks", {})
    curves = callbacks.get("Curves", {})
    losses = {str(name): float(loss) for name, loss in ours["losses"].items()}
    if curves.get("validation"):
        losses["trained"] = float(curves["validation"][-1][2])
    found = TrainingCheckpoint(
        path=path,
        plan=CollapsePlan.from_dict(ours["plan"]),
        model=_model_settings(ours["model"]),
        dtype=named_dtype(ours["dtype"]),
        losses=losses,
        recipe=ours["recipe"],
        data=ours["data"],
        steps=values["global_step"],
        tokens=curves.get("tokens", 0),
        accuracies=tuple(Accuracy(**one) for one in callbacks.get("EvaluateTasks", {}).get("found", ())),
        sharded=ours.get("sharded", False),
        state_dict=values["state_dict"],
    )
    check_model(found.model)
    kinds = {"recipe": str, "data": dict, "steps": int, "tokens": int, "sharded": bool, "state_dict": Mapping}
    for name, kind in kinds.items():
        if not isinstance(getattr(found, name), kind):
            raise TypeError(f"{name} is no {kind.__name__}")
    return found


def refuse_other_layout(checkpoint: TrainingCheckpoint, trainer: Trainer, *, resuming: bool) -> None:
    """InputError if the strategy of `trainer` can't load `checkpoint`, or would mix up the state of its optimizer."""
    name, shards = "ModelParallelStrategy", isinstance(trainer.strategy, ModelParallelStrategy)
    if checkpoint.path.is_dir() and not shards:
        raise InputError("--ckpt_path", f"{checkpoint.path} is in shards, which only trainer.strategy {name} loads")
    if resuming and checkpoint.sharded != shards:
        other = f"with trainer.strategy {name}" if checkpoint.sharded else f"without trainer.strategy {name}"
        raise InputError("--ckpt_path", f"{checkpoint.path} is of a run {other}; resume it so")


def _model_settings(values: dict[str, Any]) -> ModelSettings:
    return ModelSettings(
        **{
            **values,
            "lora": LoraSettings(**values["lora"]),
            "optimizer": OptimizerSettings(**values["optimizer"]),
            "schedule": ScheduleSettings(**values["schedule"]),
            "distill": DistillSettings(**values["distill"]),
        }
    )


def restore(checkpoint: TrainingCheckpoint) -> tuple[Any, PreTrainedTokenizerBase]:
    """The trained model (with its adapters, if it has any) and the tokenizer of its source."""
    s = checkpoint.model
    model = rebuilt(s, checkpoint.dtype, checkpoint.plan, checkpoint.state_dict)
    return model, load_tokenizer(s.source, trust_remote_code=s.trust_remote_code)


def rebuilt(s: ModelSettings, dtype: torch.dtype, plan: CollapsePlan, state_dict: Mapping[str, torch.Tensor]) -> Any:
    """The trained model (with its adapters, if it has any) from its source, its plan and what was trained."""
    module = CausalLM(s, dtype)
    module.load()
    apply_plan(module.lm, plan, weights_follow=True)  # type: ignore[arg-type]
    module.setup("fit")
    module.on_load_checkpoint({"state_dict": state_dict})
    module.load_state_dict(state_dict, strict=False)
    return module.lm.eval()
