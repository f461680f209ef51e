"""Weights of float16 are not trained: AdamW would ruin them."""

import pytest
import torch
from torch import nn

from laco_train.errors import InputError
from laco_train.precision import weights_dtype
from laco_train.settings import OptimizerSettings
from laco_train.training.optim import adamw
from tests.cli.conftest import project
from tests.cli.runs import Project

__all__ = ["project"]

SAID = (
    r"^trainer\.precision: would train weights in float16, .*; use bf16-true, bf16-mixed or 32-true, and .*dtype auto$"
)


@pytest.mark.parametrize("eight_bit", [False, True])
def test_the_optimizer_refuses_them(eight_bit: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.float16))
    settings = OptimizerSettings(eight_bit=eight_bit)
    with pytest.raises(InputError, match=SAID):
        adamw(model, settings)


def test_frozen_ones_are_no_matter() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.float16).requires_grad_(False))
    assert sum(len(group["params"]) for group in adamw(model, OptimizerSettings()).param_groups) == 2


@pytest.mark.parametrize("method", ["full", "last_layers", "lora"])
@pytest.mark.parametrize(
    ("name", "precision", "dtype"),
    [
        ("auto", "32-true", torch.float32),
        ("auto", "16-mixed", torch.float32),
        ("auto", "bf16-true", torch.bfloat16),
        ("bfloat16", "32-true", torch.bfloat16),
    ],
)
def test_other_types_train(name: str, precision: str, dtype: torch.dtype, method: str) -> None:
    assert weights_dtype(name, precision, trains=method) == dtype


@pytest.mark.parametrize(
    ("name", "precision", "methods"),
    [
        ("auto", "16-true", {"full", "last_layers", "lora"}),  # adapters are cast too
        ("float16", "16-true", {"full", "last_layers", "lora"}),
        ("float16", "32-true", {"full", "last_layers"}),
        ("float16", "bf16-mixed", {"full", "last_layers"}),
    ],
)
def test_which_recipes_would_train_them(name: str, precision: str, methods: set[str]) -> None:
    assert weights_dtype(name, precision) == torch.float16
    for method in ("full", "last_layers", "lora"):
        if method not in methods:
            assert weights_dtype(name, precision, trains=method) == torch.float16
            continue
        with pytest.raises(InputError, match=SAID):
            weights_dtype(name, precision, trains=method)


@pytest.mark.parametrize(
    "options",
    [
        ["--trainer.precision=16-true"],
        ["--model.dtype=float16"],
        ["--trainer.precision=16-true", "--model.method=lora"],
    ],
)
def test_a_fit_ends_in_a_line_and_exports_nothing(project: Project, options: list[str]) -> None:
    before = project.files()
    result = project("fit", "--recipe", "tiny.yaml", *options)
    assert result.code == 2
    assert "trainer.precision: would train weights in float16" in result.err.splitlines()[-1]
    assert project.files() == before


def test_adapters_train_on_a_float16_base(project: Project) -> None:
    losses = project.fit("--model.dtype=float16", "--model.method=lora").validation()
    assert losses[-1] < losses[0] - 0.05
