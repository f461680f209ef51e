"""The calibration loss is the model's own: for every family, for what a trial would leave, and in the plan."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from laco_train.collapse import collapse_model, decoder_of
from laco_train.collapse.similarity import calibration_batch
from laco_train.collapse.slots import Removal, Trial
from laco_train.collapse.walk import Walk
from laco_train.errors import InputError
from laco_train.settings import CollapseSettings
from tests.collapse.helpers import ALL_KEPT, RULES, TEXTS, scramble, token_ids
from tests.collapse.tiny import TINY, tiny
from tests.oracles import strategies as oracle
from tests.oracles.layer_collapse import merge_layers, without

Llama = Callable[..., LlamaForCausalLM]
# Entries that change the logits after the head, set so that leaving them out would show.
HEADS: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 0.5},
    "cohere2": {"logit_scale": 3.0},
}


def walk_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **values: Any) -> Walk:
    """A walk over `model` as it is."""
    return Walk(decoder_of(model), calibration_batch(tokenizer, TEXTS), CollapseSettings(**values))


@pytest.mark.parametrize("kind", TINY)
def test_of_the_original_is_the_models_own(tiny_tokenizer: PreTrainedTokenizerBase, kind: str) -> None:
    model = tiny(kind, **HEADS.get(kind, {}))
    walk = walk_of(model, tiny_tokenizer)
    walk.calibration_loss.refuse_inexact()
    expected = oracle.loss(model, token_ids(tiny_tokenizer, TEXTS))
    assert walk.calibration_loss.of_original == pytest.approx(expected, abs=1e-5)
    if kind in HEADS:
        plain = oracle.loss(tiny(kind), token_ids(tiny_tokenizer, TEXTS))
        assert abs(plain - expected) > 1e-2


@pytest.mark.parametrize("rule", RULES)
def test_of_a_trial_is_that_of_the_model_it_would_make(
    tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase, rule: str
) -> None:
    model = scramble(tiny_llama(layers=6), seed=1)
    samples = token_ids(tiny_tokenizer, TEXTS)
    walk = walk_of(model, tiny_tokenizer, merge_rule=rule)
    trials = [Removal(0, 1), Removal(3, 6), Trial(0, 2), Trial(4, 1)]
    wanted = [
        without(model, [0]),
        without(model, [3, 4, 5]),
        merge_layers(model, 0, 2, rule, merge_norms=False),
        merge_layers(model, 4, 1, rule, merge_norms=False),
    ]
    assert walk.losses(trials) == pytest.approx([oracle.loss(m, samples) for m in wanted], abs=1e-5)
    walk.accept(Removal(1, 2))
    walk.accept(Trial(0, 1))
    walk.states()
    cut = merge_layers(without(model, [1]), 0, 1, rule, merge_norms=False)
    assert walk.losses([Removal(2, 3)]) == pytest.approx([oracle.loss(without(cut, [2]), samples)], abs=1e-5)


def test_many_tokens_go_through_the_head_in_parts(
    tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = scramble(tiny_llama(layers=4), seed=2)
    whole = walk_of(model, tiny_tokenizer).losses([Removal(1, 2)])
    monkeypatch.setattr("laco_train.collapse.loss._TOKENS_AT_ONCE", 1)
    assert walk_of(model, tiny_tokenizer).losses([Removal(1, 2)]) == pytest.approx(whole, abs=1e-6)


def test_refused_where_it_is_not_the_models(tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """A model that adds to its loss what final states do not show: no ranking by loss, and no wrong number."""
    model = scramble(tiny_llama(layers=4), seed=3)
    forward = model.forward

    def more(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        return output if output.loss is None else dataclasses.replace(output, loss=output.loss + 0.01)

    model.forward = more
    wanted = CollapseSettings(strategy="sleb", target_depth=3, calibration=TEXTS)
    with pytest.raises(InputError, match=r"^model\.source: the loss of llama is more than"):
        collapse_model(model, tiny_tokenizer, wanted)


def test_a_head_that_reads_more_than_final_states(tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """Its loss is None in the plan of a search that ranks by similarity, and refused where it would rank."""
    model = scramble(tiny_llama(layers=4), seed=4)
    body, head = model.model, model.lm_head
    logits = head(body(input_ids=torch.tensor([[5, 6]]), use_cache=False).last_hidden_state)

    def forward(**kwargs: Any) -> Any:
        return (logits,)

    model.forward = forward
    _, plan = collapse_model(copy.deepcopy(model), tiny_tokenizer, dataclasses.replace(ALL_KEPT, layers_per_merge=2))
    assert plan.calibration is not None
    assert (plan.calibration.loss_before, plan.calibration.loss_after) == (None, None)
    with pytest.raises(InputError, match=r"^model\.source: llama computes its logits from more"):
        collapse_model(model, tiny_tokenizer, CollapseSettings(strategy="sleb", target_depth=3, calibration=TEXTS))


def test_samples_of_one_token_have_no_loss(tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    model = scramble(tiny_llama(layers=4), seed=5)
    wanted = dataclasses.replace(ALL_KEPT, layers_per_merge=2, calibration=["a", "b"])
    _, plan = collapse_model(model, tiny_tokenizer, wanted)
    assert plan.calibration is not None
    assert (plan.calibration.loss_before, plan.calibration.loss_after) == (None, None)
