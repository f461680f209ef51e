"""The LightningModule apart from whole runs."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from laco_train.errors import InputError
from laco_train.settings import LoraSettings, ModelSettings
from laco_train.training.module import CausalLM


class Epoch:
    """As much of PackedText as the length of a run needs."""

    batches_per_epoch = 10
    tokens_per_epoch = 640


@pytest.fixture
def module(tiny_folder: Callable[..., Path]) -> Callable[..., CausalLM]:
    """Factory of modules with their model loaded: ``module(dtype=torch.float32, **model settings)``."""

    def build(dtype: torch.dtype = torch.float32, **settings: Any) -> CausalLM:
        made = CausalLM(ModelSettings(source=str(tiny_folder(layers=2)), **settings), dtype)
        made.configure_model()
        made.setup("fit")
        return made

    return build


def test_second_configure_changes_nothing(module: Callable[..., CausalLM]) -> None:
    made = module()
    model = made.lm
    made.configure_model()
    assert made.lm is model


def test_second_setup_attaches_no_second_adapters(module: Callable[..., CausalLM]) -> None:
    made = module(method="lora", lora=LoraSettings(rank=2))
    names = set(made.state_dict())
    made.setup("fit")
    assert set(made.state_dict()) == names


def test_buffers_that_were_cast_are_restored(module: Callable[..., CausalLM]) -> None:
    made = module(torch.bfloat16)
    exact = {name: buffer.clone() for name, buffer in made.lm.named_buffers()}
    assert {buffer.dtype for buffer in exact.values()} == {torch.float32}
    made.to(torch.bfloat16)  # what Lightning's bf16-true does
    assert torch.bfloat16 in {buffer.dtype for buffer in made.lm.buffers()}
    made.on_validation_start()
    assert [name for name, buffer in made.lm.named_buffers() if not torch.equal(buffer, exact[name])] == []
    assert {parameter.dtype for parameter in made.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_steps": 7}, 7),
        ({"max_epochs": 2}, 20),
        ({"max_epochs": 2, "max_steps": 7}, 7),
        ({"max_epochs": 2, "max_steps": 70}, 20),
        ({"max_epochs": 2, "accumulate_grad_batches": 3}, 8),  # the rest of an epoch is a step too
        ({"max_epochs": 2, "limit_train_batches": 4}, 8),
        ({"max_epochs": 2, "limit_train_batches": 0.5}, 10),
        ({"max_epochs": 1, "limit_train_batches": 40}, 10),
        ({"fast_dev_run": True}, 1),
    ],
)
def test_length_of_a_run(module: Callable[..., CausalLM], options: dict[str, Any], steps: int, tmp_path: Path) -> None:
    made = module()
    made.trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path, **options)
    made.trainer.datamodule = Epoch()
    assert made.total_steps() == steps


def test_length_of_an_endless_run(module: Callable[..., CausalLM], tmp_path: Path) -> None:
    made = module()
    made.trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path, max_steps=-1, max_epochs=-1)
    made.trainer.datamodule = Epoch()
    with pytest.raises(InputError, match=r"trainer\.max_steps"):
        made.total_steps()


def test_state_dict_of_each_method(module: Callable[..., CausalLM]) -> None:
    full = module()
    assert set(full.state_dict()) == {f"model.{name}" for name in full.lm.state_dict()}
    lora = module(method="lora", lora=LoraSettings(rank=2, targets=["q_proj"]))
    assert set(lora.state_dict()) == lora.trainable_names()
    assert len(lora.state_dict()) == 2 * 2


@pytest.mark.parametrize("change", ["missing", "added"])
def test_checkpoint_with_other_weights_is_refused(module: Callable[..., CausalLM], change: str) -> None:
    made = module()
    state = made.state_dict()
    made.on_load_checkpoint({"state_dict": state})
    name = "model.lm_head.weight"
    if change == "missing":
        del state[name]
    else:
        name = "model.added"
        state[name] = torch.zeros(1)
    with pytest.raises(InputError, match=f"^--ckpt_path: .*1 differ, first {name}"):
        made.on_load_checkpoint({"state_dict": state})


def test_validation_loss_weighs_by_targets_and_shows_nan(module: Callable[..., CausalLM]) -> None:
    made = module()
    ids = torch.arange(8).reshape(1, 8)
    positions = torch.arange(8)[None]
    batches = [
        {"input_ids": ids, "labels": labels, "position_ids": positions}
        for labels in (ids, torch.where(positions < 6, -100, ids), torch.full_like(ids, -100))
    ]
    with torch.no_grad():
        few, many = (made.lm(input_ids=ids, labels=b["labels"]).loss.item() for b in (batches[1], batches[0]))
        for i, batch in enumerate(batches):
            made.validation_step(batch, i)
    assert made.validation_loss.compute().item() == pytest.approx((7 * many + 2 * few) / 9, rel=1e-5)
    with torch.no_grad():
        made.lm.get_input_embeddings().weight[0] = math.nan
        made.validation_step(batches[0], 3)
    assert not math.isfinite(made.validation_loss.compute().item())
