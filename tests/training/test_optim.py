"""Which AdamW, its groups, and the learning rate over a run."""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from laco_train.errors import InputError
from laco_train.settings import OptimizerSettings, ScheduleSettings, SmallUpdates
from laco_train.training.bf16_adamw import BF16AdamW
from laco_train.training.optim import adamw, learning_rate_factor, parameter_groups, warmup_cosine
from tests.cli.conftest import project
from tests.cli.runs import KEEP_ALL, Project, same_bytes
from tests.collapse.tiny import tiny

__all__ = ["project"]

SCHEDULE = ScheduleSettings(warmup_steps=4, final_ratio=0.1)


def test_norms_and_biases_do_not_decay(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    model = tiny_llama(layers=2, attention_bias=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decaying, kept = ({names[id(p)] for p in group["params"]} for group in parameter_groups(model, 0.1))
    assert kept == {name for name in names.values() if "norm" in name or name.endswith("bias")}
    assert any(name.endswith("bias") for name in kept)
    assert decaying == set(names.values()) - kept
    assert [group["weight_decay"] for group in parameter_groups(model, 0.1)] == [0.1, 0.0]


def test_stacked_biases_of_experts_do_not_decay() -> None:
    model = tiny("gpt_oss")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kept = {names[id(p)] for p in parameter_groups(model, 0.1)[1]["params"]}
    assert {name for name in names.values() if name.endswith("bias")} <= kept


def test_decay_shrinks_matrices_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    optimizer = adamw(model, OptimizerSettings(learning_rate=0.5, weight_decay=0.2))
    before = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    factors = [0.9, 1, 1, 1]  # 1 - 0.5 * 0.2 for the matrix
    for parameter, old, factor in zip(model.parameters(), before, factors, strict=True):
        torch.testing.assert_close(parameter.detach(), factor * old)


def test_frozen_parameters_are_left_out_and_settings_arrive(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    model = tiny_llama(layers=1).requires_grad_(False)
    trained = model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    settings = OptimizerSettings(learning_rate=0.02, weight_decay=0.3, beta1=0.8, beta2=0.9, epsilon=1e-6)
    (group,) = adamw(model, settings).param_groups
    assert [id(p) for p in group["params"]] == [id(trained)]
    assert (group["lr"], group["weight_decay"], group["betas"], group["eps"]) == (0.02, 0.3, (0.8, 0.9), 1e-6)


@pytest.mark.parametrize(
    ("step", "factor"),
    [(0, 0.25), (1, 0.5), (3, 1.0), (4, 1.0), (7, 0.1 + 0.45 * (1 + math.cos(math.pi / 2))), (10, 0.1), (99, 0.1)],
)
def test_warmup_then_cosine(step: int, factor: float) -> None:
    assert learning_rate_factor(step, 10, SCHEDULE) == pytest.approx(factor)


def test_no_warmup_begins_at_the_peak() -> None:
    assert learning_rate_factor(0, 10, replace(SCHEDULE, warmup_steps=0)) == 1
    constant = ScheduleSettings(warmup_steps=0, final_ratio=1)
    assert {learning_rate_factor(step, 10, constant) for step in range(11)} == {1}


def test_warmup_is_cut_to_the_run() -> None:
    assert [learning_rate_factor(step, 2, SCHEDULE) for step in range(2)] == [0.5, 1.0]
    assert learning_rate_factor(2, 2, SCHEDULE) == pytest.approx(1.0)


def test_schedule_moves_every_group() -> None:
    optimizer = adamw(nn.Linear(2, 2), OptimizerSettings(learning_rate=0.1))
    schedule = warmup_cosine(optimizer, SCHEDULE, 10)
    seen = []
    for _ in range(5):
        seen.append({group["lr"] for group in optimizer.param_groups})
        optimizer.step()
        schedule.step()
    assert [rates.pop() for rates in seen] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])
    assert all(not rates for rates in seen)


@pytest.mark.parametrize(
    ("dtypes", "small_updates", "kind", "exact"),
    [
        ([torch.bfloat16], "stochastic", BF16AdamW, False),
        ([torch.bfloat16], "float32", BF16AdamW, True),
        ([torch.bfloat16], "nearest", torch.optim.AdamW, None),
        ([torch.float32], "stochastic", torch.optim.AdamW, None),
        ([torch.float32], "float32", torch.optim.AdamW, None),
        ([torch.bfloat16, torch.float32], "stochastic", BF16AdamW, False),
        ([torch.bfloat16, torch.float32], "float32", BF16AdamW, True),
    ],
)
def test_which_adamw(
    dtypes: list[torch.dtype], small_updates: SmallUpdates, kind: type[torch.optim.Optimizer], exact: bool | None
) -> None:
    model = nn.ModuleList(nn.Linear(2, 2, dtype=dtype) for dtype in dtypes)
    optimizer = adamw(model, OptimizerSettings(learning_rate=0.02, beta1=0.8, small_updates=small_updates))
    assert type(optimizer) is kind
    assert getattr(optimizer, "exact", None) is exact
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert {(group["lr"], group["betas"][0]) for group in optimizer.param_groups} == {(0.02, 0.8)}


@pytest.mark.parametrize(
    ("torchao", "settings", "problem"),
    [
        (False, {}, "needs torchao"),
        (True, {}, "needs a GPU"),
        (True, {"small_updates": "float32"}, "small_updates: float32"),
    ],
)
def test_eight_bit_is_refused_where_it_cannot_be(
    torchao: bool, settings: dict[str, Any], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec("torch") if torchao else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    with pytest.raises(InputError, match=rf"^model\.optimizer\.eight_bit: .*{problem}") as refused:
        adamw(nn.Linear(2, 2, dtype=torch.bfloat16), OptimizerSettings(eight_bit=True, **settings))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("small_updates", ["stochastic", "float32"])
def test_bfloat16_run_learns_resumes_to_the_bit_and_exports(project: Project, small_updates: str) -> None:
    options = ["--trainer.precision", "bf16-true", "--model.optimizer.small_updates", small_updates]
    whole = project.fit(*options, *KEEP_ALL)
    losses = whole.validation()
    assert losses[-1] < losses[0] - 0.1
    states = whole.state()["optimizer_states"][0]["state"]
    assert all(("low" in state) is (small_updates == "float32") for state in states.values())
    assert {state["exp_avg"].dtype for state in states.values()} == {torch.bfloat16}
    resumed = project.fit("--ckpt_path", str(whole.checkpoint(2)), *options, *KEEP_ALL)
    expected, again = whole.state(), resumed.state()
    assert [n for n, w in again["state_dict"].items() if not torch.equal(w, expected["state_dict"][n])] == []
    theirs = again["optimizer_states"][0]["state"]
    assert theirs.keys() == states.keys()
    for number, state in states.items():
        for name, value in state.items():
            # bits: those that bfloat16 dropped may look like a NaN
            assert torch.equal(value.reshape(-1).view(torch.uint8), theirs[number][name].reshape(-1).view(torch.uint8))
    same_bytes(whole.folder / "export", resumed.folder / "export")
    assert "Model: " in whole.result.out
