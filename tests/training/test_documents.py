"""Documents packed into a block are computed as each alone, in every family of the table."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from laco_train.collapse.families import FAMILIES, MASKS, NOT_APART
from laco_train.settings import LoraSettings
from laco_train.training.adapters import attach_lora
from laco_train.training.documents import document_masks_of, keeps_documents_apart
from laco_train.training.loss import causal_lm_loss, model_inputs
from tests.collapse.tiny import LLAMA, WINDOW, tiny

LENGTHS = (WINDOW + 7, WINDOW + 9)  # of two documents, each longer than a sliding window
APART = [family.model_type for family in FAMILIES if family.documents != NOT_APART]


def packed() -> dict[str, Tensor]:
    """(2, 32) two blocks of two documents each."""
    ids = torch.randint(4, 320, (2, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    places = torch.cat([torch.arange(length) for length in LENGTHS]).expand(2, -1)
    return {"input_ids": ids, "labels": ids, "position_ids": places}


def second(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The second document of each block."""
    return {name: rows[:, LENGTHS[0] :] for name, rows in batch.items()}


@torch.no_grad()
def moved(model: Any) -> float:
    """The most that a logit of the second document changes when another stands before it."""
    behind = model(**model_inputs(model, packed())).logits[:, LENGTHS[0] :]
    alone = model(**model_inputs(model, second(packed()))).logits
    return float((behind - alone).abs().max() / alone.abs().max())


def eager(model: PreTrainedModel) -> PreTrainedModel:
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("kind", APART)
def test_a_document_is_computed_as_alone(kind: str) -> None:
    model = tiny(kind)
    assert keeps_documents_apart(model)
    assert moved(model) < 1e-5
    assert moved(eager(model)) < 1e-5


@pytest.mark.parametrize("kind", ["opt", "falcon", "gpt_oss"])
def test_gradients_too(kind: str) -> None:
    """Whatever stands before a document, its loss changes the weights alike."""
    model, batch = tiny(kind), packed()
    batch["labels"] = batch["labels"].clone()
    batch["labels"][:, : LENGTHS[0] + 1] = -100  # of the second document alone, whose first token has nothing before it
    found = []
    for start in (batch, {**batch, "input_ids": batch["input_ids"].clone()}):
        if found:
            start["input_ids"][:, : LENGTHS[0]] = 5
        model.zero_grad()
        causal_lm_loss(model, start).backward()
        layer = next(p.grad for name, p in model.named_parameters() if "0" in name and p.ndim == 2)
        found.append(layer.clone())
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", ["opt", "gpt_oss"])
def test_under_adapters_and_autocast(kind: str) -> None:
    model = attach_lora(tiny(kind), LoraSettings(rank=2, alpha=4))
    assert moved(model) < 1e-5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert moved(model) < 5e-2
        assert torch.isfinite(causal_lm_loss(model, packed()))


def test_masks_by_type_hold_the_window() -> None:
    """GPT-OSS: of a sliding layer each token sees the last of its own document alone."""
    model = tiny("gpt_oss")
    masks = document_masks_of(model, packed()["position_ids"])["attention_mask"]
    assert {family.documents for family in FAMILIES if family.model_type == "gpt_oss"} == {MASKS}
    total = sum(LENGTHS)
    for kind, width in (("full_attention", total), ("sliding_attention", WINDOW)):
        for q in range(total):
            start = 0 if q < LENGTHS[0] else LENGTHS[0]
            seen = [k for k in range(total) if masks[kind][0, 0, q, k] > -1]
            assert seen == list(range(max(start, q - width + 1), q + 1)), (kind, q)


@pytest.mark.parametrize("kind", [f.model_type for f in FAMILIES if f.documents == NOT_APART])
def test_where_nothing_is_known_to_help(kind: str) -> None:
    model = tiny(kind)
    assert not keeps_documents_apart(model)
    assert moved(model) > 0.1


def test_falcon_with_alibi_is_known_to_mix() -> None:
    model = tiny("falcon", alibi=True)
    assert not keeps_documents_apart(model)
    assert moved(model) > 0.1


@pytest.mark.parametrize(("kind", "apart"), [("stablelm", True), ("persimmon", True), ("bloom", False)])
def test_a_family_without_a_row_is_tried(kind: str, apart: bool) -> None:
    assert keeps_documents_apart(tiny(kind, **LLAMA)) == apart
