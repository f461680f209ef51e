"""A runtime that computes something else is told from one that only rounds."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from laco_train.errors import TrainingStopped
from laco_train.export.runtime_proof import (
    PROMPTS,
    Ids,
    greedy,
    greedy_by_checking,
    prompts_for,
    prove_equal,
    prove_near,
    text_logits,
)

Tiny = Callable[..., LlamaForCausalLM]


class Other:
    """A runtime that is another Transformers model, its logits changed by `change`."""

    name = "other"

    def __init__(self, model: LlamaForCausalLM, change: Callable[[Tensor], Tensor] = lambda logits: logits):
        self.model, self.change = model, change

    def greedy(self, prompts: Sequence[Ids], count: int) -> list[Ids]:
        """By whole passes, so that `change` counts at each step."""
        return [self._greedy(prompt, count) for prompt in prompts]

    def _greedy(self, prompt: Ids, count: int) -> Ids:
        text = list(prompt)
        for _ in range(count):
            text.append(int(self.logits([text])[0][-1].argmax()))
        return text[len(prompt) :]

    def logits(self, sequences: Sequence[Ids]) -> list[Tensor]:
        """After `change`."""
        return [self.change(text_logits(self.model, one)) for one in sequences]


@pytest.fixture
def model(tiny_llama: Tiny) -> LlamaForCausalLM:
    return tiny_llama(layers=2)


def test_the_same_model(model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    proof = prove_equal(model, Other(model), tiny_tokenizer)
    assert (proof.prompts, proof.tokens, proof.flips, proof.max_logit_difference) == (5, 5 * 64, 0, 0)
    assert "320 greedy tokens of 5 prompts as in Transformers (no flip)" in proof.lines()[0]


def test_a_padded_vocabulary(model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    padded = Other(model, lambda logits: torch.nn.functional.pad(logits, (0, 7), value=-100.0))
    assert prove_equal(model, padded, tiny_tokenizer).max_logit_difference == 0


def test_another_token_is_named(model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    def second_best(logits: Tensor) -> Tensor:
        changed = logits.clone()
        changed[40, changed[40].argmax()] = -10.0
        return changed

    shorter = Other(model, lambda logits: second_best(logits) if len(logits) > 40 else logits)
    with pytest.raises(TrainingStopped, match=r"other chose token \d+ as new token \d+ of prompt \d, whose logit in"):
        prove_equal(model, shorter, tiny_tokenizer)


@pytest.mark.parametrize(("gap", "allowed"), [(5e-4, True), (5e-3, False)])
def test_a_flip_counts_by_its_gap(
    model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, gap: float, allowed: bool
) -> None:
    """Rows of the head are made nearly twins: the reference prefers one by the gap, the runtime the other."""
    (prompt, *_), _ = prompts_for(model, tiny_tokenizer)
    best = int(text_logits(model, prompt)[-1].argmax())
    twin = (best + 1) % len(tiny_tokenizer)
    with torch.no_grad():
        model.lm_head.weight[twin] = model.lm_head.weight[best]

    def prefer(token: int) -> Callable[[Tensor], Tensor]:
        def change(logits: Tensor) -> Tensor:
            changed = logits.clone()
            changed[:, token] += gap
            return changed

        return change

    reference: Any = model
    head = model.lm_head.forward
    model.lm_head.forward = lambda states: prefer(best)(head(states)[0]).unsqueeze(0)  # type: ignore[method-assign]
    runtime = Other(model, lambda logits: prefer(twin)(prefer(twin)(logits)))
    if allowed:
        assert prove_equal(reference, runtime, tiny_tokenizer).flips > 0
    else:
        with pytest.raises(TrainingStopped, match=r"is 0\.005 below that of token"):
            prove_equal(reference, runtime, tiny_tokenizer)


@pytest.mark.parametrize("prove", [prove_equal, prove_near])
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda logits: logits * float("nan"), "not finite"),
        (lambda logits: logits[:, :-1], r"logits of shape \(\d+, 319\), not \(\d+, 320\)"),
    ],
)
def test_logits_that_are_none(
    model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, prove: Any, change: Any, problem: str
) -> None:
    with pytest.raises(TrainingStopped, match=problem):
        prove(model, Other(model, change), tiny_tokenizer)


def test_a_near_model_and_its_figures(model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Against the definitions: KL of a softmax at two temperatures, over the same positions."""
    proof = prove_near(model, Other(model, lambda logits: logits * 1.05), tiny_tokenizer)
    prompts, count = prompts_for(model, tiny_tokenizer)
    texts = [prompt + greedy(model, prompt, count) for prompt in prompts]
    logits = torch.cat([text_logits(model, text) for text in texts])
    ours, theirs = logits.softmax(-1), (logits * 1.05).softmax(-1)
    assert proof.tokens == sum(map(len, texts))
    assert proof.agreement == 1
    assert proof.divergence == pytest.approx((ours * (ours / theirs).log()).sum(-1).mean().item(), rel=1e-3)
    assert "top-1 agreement 1.0000 (at least 0.97), mean KL 0.0" in proof.lines()[0]


@pytest.mark.parametrize("change", [lambda logits: logits * 2, lambda logits: logits.roll(1, dims=1)])
def test_a_far_model_fails(model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, change: Any) -> None:
    with pytest.raises(TrainingStopped, match=r"top-1 agreement [01]\.\d+ \(at least 0\.97\), mean KL"):
        prove_near(model, Other(model, change), tiny_tokenizer)


def test_a_draft_changes_no_token(tiny_llama: Tiny, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Drafts of a model that agrees always, often and hardly ever."""
    model = tiny_llama(layers=2)
    nearby, other = copy.deepcopy(model), tiny_llama(layers=1, seed=5)
    with torch.no_grad():
        for parameter in nearby.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    prompts, count = prompts_for(model, tiny_tokenizer)[0][:2], 12
    runtime = Other(model)
    expected = [greedy(model, prompt, count) for prompt in prompts]
    for draft in (model, nearby, other):
        passes: list[int] = []

        def logits(texts: Sequence[Ids], passes: list[int] = passes) -> list[Tensor]:
            passes.append(len(texts))
            return runtime.logits(texts)

        with torch.no_grad():
            assert greedy_by_checking(draft, logits, prompts, count) == expected
        assert len(passes) == 1 if draft is model else len(passes) > 1


def test_decoding_leaves_the_generation_config_alone(
    model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    own = model.generation_config
    before = own.to_dict()
    (prompt, *_), _ = prompts_for(model, tiny_tokenizer)
    greedy(model, prompt, 3)
    assert model.generation_config is own
    assert own.to_dict() == before


def test_few_positions_mean_fewer_tokens(tiny_llama: Tiny, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    prompts, count = prompts_for(tiny_llama(layers=1, max_position_embeddings=40), tiny_tokenizer)
    assert len(prompts) == len(PROMPTS)
    assert count == 20
    assert max(map(len, prompts)) == 20
