"""The next-token loss on packed blocks, against documents run one by one."""

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from laco_train.training.loss import Batch, causal_lm_loss, mean_loss, target_tokens

IGNORED = -100


def batch_of(*blocks: list[list[int]]) -> Batch:
    """Blocks of documents; the first token of a document is no target."""
    ids = torch.tensor([[token for document in block for token in document] for block in blocks])
    labels = torch.tensor([[t for document in block for t in (IGNORED, *document[1:])] for block in blocks])
    positions = torch.tensor([[i for document in block for i in range(len(document))] for block in blocks])
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def losses_one_by_one(model: LlamaForCausalLM, documents: list[list[int]]) -> torch.Tensor:
    parts = []
    for document in documents:
        ids = torch.tensor(document)
        parts.append(cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none"))
    return torch.cat(parts)


@pytest.fixture
def model(tiny_llama: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    # weights large enough that a glance at a neighbouring document would change the loss
    return tiny_llama(layers=3, initializer_range=0.5)


FIRST, SECOND = [[5, 6, 7, 8, 9], [20, 21, 22]], [[40, 41, 42, 43, 44, 45, 46, 47]]


def test_documents_of_a_block_do_not_see_each_other(model: LlamaForCausalLM) -> None:
    with torch.no_grad():
        loss = causal_lm_loss(model, batch_of(FIRST, SECOND)).item()
        apart = losses_one_by_one(model, [*FIRST, *SECOND]).mean().item()
        leaking = causal_lm_loss(model, batch_of([FIRST[0] + FIRST[1]], SECOND)).item()
    assert loss == pytest.approx(apart, rel=1e-5)
    assert loss != pytest.approx(leaking, rel=1e-3)


def test_target_tokens() -> None:
    batch = batch_of(FIRST, SECOND)
    assert int(target_tokens(batch)) == 4 + 2 + 7
    batch["labels"][:, 0] = 3  # the first of a block is never predicted
    assert int(target_tokens(batch)) == 13


def test_mean_loss_weighs_batches_by_targets(model: LlamaForCausalLM) -> None:
    batches = [batch_of(FIRST), batch_of(SECOND)]
    result = mean_loss(model, batches, torch.device("cpu"), contextlib.nullcontext)
    with torch.no_grad():
        expected = losses_one_by_one(model, [*FIRST, *SECOND]).mean().item()
        unweighted = sum(causal_lm_loss(model, b).item() for b in batches) / 2
    assert result.tokens == 13
    assert result.loss == pytest.approx(expected, rel=1e-5)
    assert result.loss != pytest.approx(unweighted, rel=1e-3)


def test_batch_without_a_target_counts_for_nothing(model: LlamaForCausalLM) -> None:
    silent = batch_of(FIRST)
    silent["labels"][:] = IGNORED
    batches = [silent, batch_of(SECOND)]
    with_silent = mean_loss(model, batches, torch.device("cpu"), contextlib.nullcontext)
    assert with_silent == mean_loss(model, batches[1:], torch.device("cpu"), contextlib.nullcontext)


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_the_model_as_it_was(model: LlamaForCausalLM, training: bool) -> None:
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train(training)
    first, second = (mean_loss(model, [batch_of(FIRST)], torch.device("cpu"), contextlib.nullcontext) for _ in range(2))
    assert first == second  # no dropout while measuring
    assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_precision_of_training_is_that_of_measuring(model: LlamaForCausalLM) -> None:
    def context() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)

    exact, rounded = (
        mean_loss(model, [batch_of(FIRST)], torch.device("cpu"), c).loss for c in (contextlib.nullcontext, context)
    )
    assert exact != rounded
    assert exact == pytest.approx(rounded, rel=0.05)
