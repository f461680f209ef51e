"""What no model, text or machine could satisfy in a recipe's sections; each check names the key. Imports no torch."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

from laco_train.errors import InputError
from laco_train.settings import (
    BudgetSettings,
    CollapseSettings,
    DataSettings,
    DistillSettings,
    EvaluationSettings,
    ExportSettings,
    MergeRule,
    ModelSettings,
    RefineSettings,
    RoundSettings,
    Strategy,
)


def check_static(key: str, ok: bool, problem: str) -> None:
    """Raise InputError unless `ok`."""
    if not ok:
        raise InputError(key, problem)


def check_model(s: ModelSettings) -> None:
    """Refuse model settings that no model could satisfy."""
    check_static("model.source", bool(s.source.strip()), "is empty; name a hub id, a folder or a .gguf file")
    o, c, lora = s.optimizer, s.schedule, s.lora
    check_static("model.optimizer.learning_rate", o.learning_rate > 0, f"must be above 0, is {o.learning_rate}")
    check_static("model.optimizer.weight_decay", o.weight_decay >= 0, f"must be 0 or more, is {o.weight_decay}")
    for name in ("beta1", "beta2"):
        value = getattr(o, name)
        check_static(f"model.optimizer.{name}", 0 <= value < 1, f"must be 0 to below 1, is {value}")
    check_static("model.optimizer.epsilon", o.epsilon > 0, f"must be above 0, is {o.epsilon}")
    check_static("model.schedule.warmup_steps", c.warmup_steps >= 0, f"must be 0 or more, is {c.warmup_steps}")
    check_static("model.schedule.final_ratio", 0 <= c.final_ratio <= 1, f"must be 0 to 1, is {c.final_ratio}")
    check_static(
        "model.optimizer.max_skipped_steps", o.max_skipped_steps >= 1, f"must be 1 or more, is {o.max_skipped_steps}"
    )
    check_static("model.last_layers", s.last_layers >= 1, f"must be 1 or more, is {s.last_layers}")
    kept = not s.from_scratch or s.method == "full"  # a checkpoint would not hold random weights that don't train
    check_static("model.from_scratch", kept, f"goes not with model.method {s.method}; use full")
    check_distill(s.distill)
    check_static("model.lora.rank", lora.rank >= 1, f"must be 1 or more, is {lora.rank}")
    check_static("model.lora.alpha", lora.alpha >= 1, f"must be 1 or more, is {lora.alpha}")
    check_static("model.lora.dropout", 0 <= lora.dropout < 1, f"must be 0 to below 1, is {lora.dropout}")
    check_static("model.lora.targets", bool(lora.targets), "is empty; name modules or say all-linear")


def check_distill(s: DistillSettings) -> None:
    """Refuse distillation settings that no teacher could satisfy."""
    check_static("model.distill.logits", 0 <= s.logits <= 1, f"must be 0 to 1, is {s.logits}")
    check_static("model.distill.temperature", s.temperature > 0, f"must be above 0, is {s.temperature}")
    check_static("model.distill.hidden", s.hidden >= 0, f"must be 0 or more, is {s.hidden}")
    used = s.logits > 0 or s.hidden > 0
    unused = "is set, but model.distill.logits and hidden are both 0; raise one"
    check_static("model.distill.teacher", used or s.teacher is None, unused)
    check_static("model.distill.precomputed", used or not s.precomputed, unused)


def check_export(s: ExportSettings) -> None:
    """Refuse a size that Transformers does not read."""
    key, known = "export.shard_size", re.fullmatch(r"[1-9]\d*(KB|MB|GB)", s.shard_size)
    check_static(key, known is not None, f"must be a number with KB, MB or GB, such as 5GB, is {s.shard_size}")


def check_budget(s: BudgetSettings) -> None:
    """Refuse a budget that allows no step."""
    enough = s.max_tokens is None or s.max_tokens >= 1
    check_static("budget.max_tokens", enough, f"must be 1 or more, is {s.max_tokens}")
    key, shares = "budget.evaluate_at", s.evaluate_at
    check_static(key, all(0 < share <= 1 for share in shares), f"must be shares above 0, 1 at most, is {shares}")
    check_static(key, len(set(shares)) == len(shares), f"names a share twice: {shares}")


def check_limits(trainer: Mapping[str, Any]) -> None:
    """Refuse options of the Trainer with which a fit would train on nothing, or never tell a loss."""
    for name in ("max_steps", "max_epochs", "limit_train_batches"):
        nothing = "is 0, so nothing would train; the verb collapse does without"
        check_static(f"trainer.{name}", trainer.get(name) != 0, nothing)
    apart = "would put losses on unlike texts into one curve; use"
    some = trainer.get("limit_val_batches")  # 1 is one batch, 1.0 all of them
    whole = some is None or (isinstance(some, float) and some == 1)
    check_static("trainer.limit_val_batches", whole, f"{apart} data.validation_max_tokens")
    check_static("trainer.overfit_batches", not trainer.get("overfit_batches"), f"{apart} data.max_tokens")
    every = trainer.get("val_check_interval")
    check_static("trainer.val_check_interval", every is None or every != 0, "must be above 0, is 0")
    batches = trainer.get("accumulate_grad_batches", 1)
    check_static("trainer.accumulate_grad_batches", batches >= 1, f"must be 1 or more, is {batches}")


def check_evaluation(s: EvaluationSettings) -> None:
    """Refuse an evaluation that names nothing to measure, or nothing to measure it by."""
    key, shares = "evaluation.at", s.at
    check_static(key, all(0 <= share <= 1 for share in shares), f"must be shares from 0 to 1, is {shares}")
    check_static(key, len(set(shares)) == len(shares), f"names a share twice: {shares}")
    check_static(key, bool(shares) or not s.tasks, "is empty; name shares, or drop evaluation.tasks")
    check_static("evaluation.limit", s.limit is None or s.limit >= 1, f"must be 1 or more, is {s.limit}")
    check_static("evaluation.batch_size", s.batch_size >= 1, f"must be 1 or more, is {s.batch_size}")
    check_static("evaluation.prompts", s.samples or s.prompts is None, "is set, but evaluation.samples is false")


def check_collapse(s: CollapseSettings, depth: int | None = None) -> None:
    """Refuse collapse settings that are wrong, for a model of `depth` layers if it is known."""
    check_static("collapse.plan", s.plan is None or s.remove is None, "goes not with collapse.remove; drop one")
    check_refine(s.refine)
    c, low, high = s.layers_per_merge, s.lowest_layer, s.highest_layer
    check_static("collapse.layers_per_merge", c >= 2, f"C must be 2 or more (1 merges nothing), is {c}")
    check_static("collapse.lowest_layer", low >= 1, f"L counts from 1, is {low}; use 1 for the first layer")
    check_static("collapse.min_interval", s.min_interval >= 1, f"I must be 1 or more, is {s.min_interval}")
    t = s.similarity_threshold
    check_static("collapse.similarity_threshold", t is None or -1 <= t <= 1, f"T is a cosine, -1 to 1, is {t}")
    check_target(s, depth)
    if s.remove is not None:
        check_static("collapse.remove", len(s.remove) > 0, "is empty; name layers, counted from 0")
        check_static("collapse.remove", len(set(s.remove)) == len(s.remove), "names a layer twice")
        check_static("collapse.remove", min(s.remove) >= 0, f"counts from 0, has {min(s.remove)}")
        if depth is not None:
            worst = max(s.remove)
            check_static("collapse.remove", worst < depth, f"has {worst}, but the last layer is {depth - 1}")
            check_static("collapse.remove", len(s.remove) < depth, "would remove every layer; leave at least one")
    if high is None:
        high = depth
    if high is not None and s.plan is None and s.remove is None and s.strategy in ("laco", "greedy"):
        if depth is not None:
            check_static("collapse.layers_per_merge", c <= depth, f"C is {c}, more than the model's {depth} layers")
            check_static("collapse.highest_layer", high <= depth, f"H is {high}, more than the model's {depth} layers")
        check_static("collapse.lowest_layer", low < high, f"L is {low}, not below H = {high}; lower L")
        check_static(
            "collapse.highest_layer",
            high - c >= low,
            f"H - C = {high} - {c} is below L = {low}, so nothing would be tried; raise H, lower C or lower L",
        )


def check_refine(s: RefineSettings) -> None:
    """Refuse a refinement that could not be done."""
    key = "collapse.refine"
    check_static(f"{key}.tokens", s.tokens >= 0, f"must be 0 or more, is {s.tokens}")
    check_static(f"{key}.seconds", s.seconds is None or s.seconds > 0, f"must be above 0, is {s.seconds}")
    check_static(f"{key}.windows", 0 <= s.windows <= 1, f"must be 0 to 1, is {s.windows}")
    check_static(f"{key}.batch_size", s.batch_size >= 1, f"must be 1 or more, is {s.batch_size}")
    check_static(f"{key}.learning_rate", s.learning_rate > 0, f"must be above 0, is {s.learning_rate}")


def check_target(s: CollapseSettings, depth: int | None) -> None:
    """Refuse a target that contradicts other settings, or that no model of `depth` layers can meet."""
    target, ratio = s.target_depth, s.target_ratio
    check_strategy(s)
    if target is None and ratio is None:
        check_static("collapse.exact", not s.exact, "needs collapse.target_depth or collapse.target_ratio")
        return
    key = target_key(s)
    check_static(key, target is None or ratio is None, "goes not with collapse.target_ratio; drop one")
    check_static(key, s.similarity_threshold is None, "goes not with collapse.similarity_threshold; drop one")
    check_static(key, s.plan is None, "goes not with collapse.plan; drop one")
    check_static(key, s.remove is None, "goes not with collapse.remove; drop one")
    check_static(key, target is None or target >= 1, f"must be 1 or more, is {target}")
    check_static(key, ratio is None or 0 < ratio < 1, f"must be above 0 and below 1, is {ratio}")
    if depth is not None and target is not None:
        check_static(key, target < depth, f"is {target}, but the model has only {depth} layers; ask for fewer")


def target_key(s: CollapseSettings) -> str:
    """Key of the target that `s` has."""
    return "collapse.target_depth" if s.target_depth is not None else "collapse.target_ratio"


def least_depth(s: CollapseSettings, depth: int) -> int:
    """Layers that a search leaves of `depth` if it accepts every merge that it tries."""
    c, low, high = s.layers_per_merge, s.lowest_layer, s.highest_layer or depth
    if s.strategy == "greedy":
        return low + 1 + depth - high
    if s.strategy != "laco":
        return 1
    pointer = high - c
    while pointer >= low:
        depth -= c - 1
        pointer = min(pointer - s.min_interval, depth - c)
    return depth


def out_of_reach(s: CollapseSettings, least: int) -> str:
    """Why no search by `s` leaves fewer than `least` layers, and what to do."""
    return (
        f"but {s.strategy} leaves {least} layers at least, by C, L, I and H; raise C or H, lower L or I, or set "
        "another collapse.strategy"
    )


def check_strategy(s: CollapseSettings) -> None:
    """Refuse a strategy or a rule of no such name, and a strategy that other settings contradict or never end."""
    for name, known in (("strategy", get_args(Strategy)), ("merge_rule", get_args(MergeRule))):
        value = getattr(s, name)
        check_static(f"collapse.{name}", value in known, f"is {value!r}, which is none of {', '.join(known)}")
    key, targeted = "collapse.strategy", s.target_depth is not None or s.target_ratio is not None
    if s.strategy != "laco":
        check_static(key, s.plan is None, f"{s.strategy} goes not with collapse.plan; drop one")
        check_static(key, s.remove is None, f"{s.strategy} goes not with collapse.remove; drop one")
    if s.strategy == "none":
        check_static(key, not targeted, "none keeps every layer, so no target can be met; drop one of the two")
    elif s.strategy not in ("laco", "greedy"):
        check_static(key, targeted, f"{s.strategy} needs collapse.target_depth or collapse.target_ratio")
    check_static(
        "collapse.criterion",
        s.criterion == "similarity" or s.strategy == "greedy",
        f"loss is for collapse.strategy: greedy, not {s.strategy}; drop it or set the strategy",
    )
    check_static(
        "collapse.criterion",
        s.criterion == "similarity" or targeted,
        "loss has no threshold to end at; set collapse.target_depth or collapse.target_ratio",
    )


def check_rounds(rounds: list[RoundSettings], s: CollapseSettings, depth: int | None = None) -> None:
    """Refuse rounds that no model could go through, or none of `depth` layers if it is known."""
    check_static("rounds", len(rounds) > 0, "is empty; name a round or more, or leave it out")
    for key, value in (("plan", s.plan), ("remove", s.remove), ("target_ratio", s.target_ratio)):
        check_static(f"collapse.{key}", value is None, "goes not with rounds, which search for a depth; drop one")
    check_static("collapse.target_depth", s.target_depth is None, "goes not with rounds, which name theirs; drop it")
    left = depth
    for number, one in enumerate(rounds):
        key, target = f"rounds[{number}]", one.target_depth
        falls = left is None or target < left
        before = "the model has" if number == 0 else "the round before leaves"
        check_static(f"{key}.target_depth", falls, f"is {target}, but {before} {left} layers; ask for fewer")
        tokens, rate = one.max_tokens, one.learning_rate
        check_static(f"{key}.max_tokens", tokens is None or tokens >= 1, f"must be 1 or more, is {tokens}")
        check_static(f"{key}.learning_rate", rate is None or rate > 0, f"must be above 0, is {rate}")
        check_collapse(replace(s, target_depth=target), left)
        left = target


def check_one_of(rounds: Sequence[Any] | None, s: CollapseSettings) -> None:
    """Refuse `rounds` where one model is asked for, unless the collapse says which."""
    told = s.target_depth is not None or s.plan is not None
    problem = "make several models, and one is asked for; name the depth of one by collapse.target_depth"
    check_static("rounds", told or not rounds, problem)


def check_data(s: DataSettings, positions: int | None = None) -> None:
    """Refuse data settings that no text could satisfy, or a model of so many `positions` if they are known."""
    check_static("data.train", bool(s.train), "is empty; name a file or a data set")
    check_static("data.block_size", s.block_size >= 2, f"must be 2 or more, is {s.block_size}")
    fits = positions is None or s.block_size <= positions
    check_static("data.block_size", fits, f"is {s.block_size}, more than the model's {positions} positions; lower it")
    check_static("data.batch_size", s.batch_size >= 1, f"must be 1 or more, is {s.batch_size}")
    check_static("data.num_workers", s.num_workers >= 0, f"must be 0 or more, is {s.num_workers}")
    for name in ("max_tokens", "validation_max_tokens"):
        value = getattr(s, name)
        enough = value is None or value >= s.block_size
        check_static(f"data.{name}", enough, f"is {value}, less than one block of {s.block_size} tokens; raise it")
    fraction = s.validation_fraction
    check_static("data.validation_fraction", 0 < fraction < 1, f"must be above 0 and below 1, is {fraction}")
    swept, held_out = s.sweep_fraction, fraction if s.validation is None else 0.0
    check_static("data.sweep_fraction", 0 <= swept < 1, f"must be 0 to below 1, is {swept}")
    check_static("data.sweep_fraction", swept + held_out < 1, f"is {swept}, which leaves nothing to train on; lower it")
    needed = s.validate_on == "validation" or swept > 0
    check_static("data.validate_on", needed, "sweep needs documents; raise data.sweep_fraction above 0")
