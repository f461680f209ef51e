"""AdamW's groups, and the learning rate over a run."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from laco_train.settings import OptimizerSettings, ScheduleSettings
from laco_train.training.optim import adamw, learning_rate_factor, parameter_groups, warmup_cosine

SCHEDULE = ScheduleSettings(warmup_steps=4, final_ratio=0.1)


def test_norms_and_biases_do_not_decay(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    model = tiny_llama(layers=2, attention_bias=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decaying, kept = ({names[id(p)] for p in group["params"]} for group in parameter_groups(model, 0.1))
    assert kept == {name for name in names.values() if "norm" in name or name.endswith("bias")}
    assert any(name.endswith("bias") for name in kept)
    assert decaying == set(names.values()) - kept
    assert [group["weight_decay"] for group in parameter_groups(model, 0.1)] == [0.1, 0.0]


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
