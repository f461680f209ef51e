"""The search with cached prefixes against whole copies and full forwards, and the model that it leaves."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerBase

from laco_train.collapse import collapse_model
from laco_train.settings import CollapseSettings
from tests.collapse.helpers import ALL_KEPT, RULES, TEXTS, Case, assert_same_weights, cases, scramble, token_ids
from tests.oracles.layer_collapse import Collapsed, layer_collapse
from tests.oracles.published import published_collapse

Llama = Callable[..., LlamaForCausalLM]
# Biases merge like the weights they belong to; a tied head must stay tied.
SHAPES: list[dict[str, Any]] = [{}, {"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}]


def as_settings(case: Case, rule: str, merge_norms: bool) -> CollapseSettings:
    """`case` in the words of a recipe."""
    return CollapseSettings(
        layers_per_merge=case.C,
        lowest_layer=case.L,
        highest_layer=case.H,
        min_interval=case.I,
        similarity_threshold=case.T,
        calibration=list(case.texts),
        merge_rule=rule,  # type: ignore[arg-type]
        merge_norms=merge_norms,
    )


def by_algorithm(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, case: Case, rule: str, merge_norms: bool
) -> Collapsed:
    """The oracle's answer, for a T that rounding can't cross."""
    letters = {"C": case.C, "L": case.L, "H": case.H, "I": case.I, "T": case.T}
    samples = token_ids(tokenizer, list(case.texts))
    return layer_collapse(model, samples, rule=rule, merge_norms=merge_norms, **letters)  # type: ignore[arg-type]


def assert_same_search(plan: Any, expected: Collapsed, similarity_within: float) -> None:
    """Every candidate in order, the accepted merges and the lineage."""
    assert [(c.layer, c.absorbed, c.accepted) for c in plan.candidates] == [
        (c.layer, c.absorbed, c.accepted) for c in expected.candidates
    ]
    for tried, wanted in ((plan.candidates, expected.candidates), (plan.merges, expected.merges)):
        similarities = [c.similarity for c in wanted]
        assert [c.similarity for c in tried] == pytest.approx(similarities, abs=similarity_within)
    assert [(m.layer, m.absorbed) for m in plan.merges] == [(m.layer, m.absorbed) for m in expected.merges]
    assert plan.depth == len(expected.lineage)


@settings(max_examples=40, deadline=None)
@given(case=cases(), rule=st.sampled_from(RULES), merge_norms=st.booleans(), shape=st.sampled_from(SHAPES))
def test_same_as_algorithm_1(
    tiny_llama: Llama,
    tiny_tokenizer: PreTrainedTokenizerBase,
    case: Case,
    rule: str,
    merge_norms: bool,
    shape: dict[str, Any],
) -> None:
    model = scramble(tiny_llama(layers=case.depth, **shape), case.seed)
    expected = by_algorithm(model, tiny_tokenizer, case, rule, merge_norms)
    assume(all(abs(c.similarity - case.T) > 1e-4 for c in expected.candidates))
    result, plan = collapse_model(model, tiny_tokenizer, as_settings(case, rule, merge_norms))
    assert result is model
    assert_same_search(plan, expected, 1e-5)
    assert_same_weights(model, expected.model)
    if rule == "drop":
        kept = {chain[0] for chain in expected.lineage}
        assert [list(chain) for chain in plan.lineage] == [[i] for i in sorted(kept)]
        assert list(plan.removed) == [i for i in range(case.depth) if i not in kept]
    else:
        assert [list(chain) for chain in plan.lineage] == expected.lineage
        assert list(plan.removed) == []


@settings(max_examples=15, deadline=None)
@given(case=cases(), rule=st.sampled_from(RULES), merge_norms=st.booleans())
def test_same_as_algorithm_1_in_bfloat16(
    tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase, case: Case, rule: str, merge_norms: bool
) -> None:
    """Every accepted merge is computed in float32 and rounded once, and a later merge reads the rounded layer."""
    model = scramble(tiny_llama(layers=case.depth), case.seed).to(torch.bfloat16)
    expected = by_algorithm(model, tiny_tokenizer, case, rule, merge_norms)
    assume(all(abs(c.similarity - case.T) > 0.03 for c in expected.candidates))
    _, plan = collapse_model(model, tiny_tokenizer, as_settings(case, rule, merge_norms))
    assert_same_search(plan, expected, 0.03)
    assert_same_weights(model, expected.model)
    assert plan.dtype == "bfloat16"


@settings(max_examples=15, deadline=None)
@given(case=cases())
def test_last_is_what_the_published_code_computes(
    tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase, case: Case
) -> None:
    """For I >= C - 1, where neither walk reaches its clamp; for C = 2 the paper's formula gives the same."""
    case = replace(case, I=max(case.I, case.C - 1))
    model = scramble(tiny_llama(layers=case.depth), case.seed)
    samples = token_ids(tiny_tokenizer, list(case.texts))
    expected = published_collapse(model, samples, C=case.C, L=case.L - 1, H=case.H - 1, interval=case.I, T=case.T)
    assume(all(abs(c.similarity - case.T) > 1e-4 for c in expected.candidates))
    rule = "rdsc" if case.C == 2 else "last"
    _, plan = collapse_model(model, tiny_tokenizer, as_settings(case, rule, merge_norms=False))
    assert_same_search(plan, expected, 1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, expected.model.get_parameter(name), rtol=0, atol=3e-6)


@pytest.mark.parametrize("side", ["left", "right", "no pad token"])
def test_one_padded_batch_decides_as_one_sample_at_a_time(
    tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase, side: str
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    if side == "no pad token":
        tokenizer.pad_token = None
    else:
        tokenizer.padding_side = side
    rejecting = CollapseSettings(layers_per_merge=2, similarity_threshold=1.0)

    def similarities(texts: list[str]) -> list[float]:
        model = scramble(tiny_llama(layers=6), seed=5)
        plan = collapse_model(model, tokenizer, replace(rejecting, calibration=texts))[1]
        return [c.similarity for c in plan.candidates]

    alone = [similarities([text]) for text in TEXTS]
    means = [sum(values) / len(TEXTS) for values in zip(*alone, strict=True)]
    assert similarities(TEXTS) == pytest.approx(means, abs=1e-6)
    assert similarities(TEXTS[::-1]) == pytest.approx(means, abs=1e-6)
    assert len({round(values[0], 3) for values in alone}) == len(TEXTS)  # else a wrong mean would pass


def test_accepted_only_strictly_above_the_threshold(tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    def first_candidate(threshold: float) -> Any:
        model = scramble(tiny_llama(layers=5), seed=6)
        searched = CollapseSettings(layers_per_merge=2, similarity_threshold=threshold, calibration=TEXTS)
        return collapse_model(model, tiny_tokenizer, searched)[1].candidates[0]

    exact = first_candidate(1.0).similarity
    assert not first_candidate(exact).accepted
    assert first_candidate(math.nextafter(exact, -1)).accepted


def test_nothing_accepted_leaves_the_model_alone(tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    model = scramble(tiny_llama(layers=6), seed=7)
    before = copy.deepcopy(model)
    result, plan = collapse_model(
        model, tiny_tokenizer, CollapseSettings(layers_per_merge=2, similarity_threshold=1.0, calibration=TEXTS)
    )
    assert result is model
    assert (list(plan.merges), list(plan.removed), plan.depth, plan.source_depth) == ([], [], 6, 6)
    assert [list(chain) for chain in plan.lineage] == [[i] for i in range(6)]
    assert [c.layer for c in plan.candidates] == [3, 2, 1, 0]
    assert plan.parameters.before == plan.parameters.after
    assert plan.parameters.ratio == 0
    assert model.config.to_dict() == before.config.to_dict()
    assert_same_weights(model, before)


def test_each_candidate_is_reported_once_as_it_is_decided(
    tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    seen: list[Any] = []
    model = scramble(tiny_llama(layers=8), seed=8)
    _, plan = collapse_model(model, tiny_tokenizer, replace(ALL_KEPT, layers_per_merge=2), on_candidate=seen.append)
    assert seen == list(plan.candidates)
    assert all(c.seconds >= 0 for c in seen)


def test_no_copy_of_the_model_and_no_prefix_twice(tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """Untouched weights stay where they lie; layers below L run once for the calibration, not once a candidate."""
    model = scramble(tiny_llama(layers=8), seed=9)

    def refuse(memo: object) -> None:
        raise AssertionError("the whole model was copied")

    model.__deepcopy__ = refuse
    places = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    calls = [0] * 8
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    searched = CollapseSettings(layers_per_merge=2, lowest_layer=3, similarity_threshold=1.0, calibration=TEXTS)
    _, plan = collapse_model(model, tiny_tokenizer, searched)
    assert [c.layer for c in plan.candidates] == [5, 4, 3, 2]
    assert calls[:2] == [1, 1]
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == places


def test_dropout_and_gradients_stay_out_of_the_search(
    tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    """A trainer hands over a model in training mode: the search measures without dropout and keeps that mode."""
    outcomes = []
    for training in (False, True):
        model = scramble(tiny_llama(layers=7, attention_dropout=0.5), seed=10).train(training)
        _, plan = collapse_model(model, tiny_tokenizer, ALL_KEPT)
        outcomes.append([c.similarity for c in plan.candidates])
        assert all(module.training is training for module in model.modules())
        assert all(p.requires_grad and p.is_leaf and p.grad is None for p in model.parameters())
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("shape", SHAPES)
def test_collapsed_model_generates_and_reloads(
    tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, shape: dict[str, Any]
) -> None:
    model = scramble(tiny_llama(layers=9, **shape), seed=11)
    _, plan = collapse_model(model, tiny_tokenizer, ALL_KEPT)
    assert len(model.model.layers) == model.config.num_hidden_layers == plan.depth < 9
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == list(range(plan.depth))

    prompt = tiny_tokenizer(TEXTS[0], return_tensors="pt")
    how = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": -1, "return_dict_in_generate": True}
    cached, uncached = (
        model.generate(**prompt, **how, output_logits=True, use_cache=use_cache) for use_cache in (True, False)
    )
    assert torch.equal(cached.sequences, uncached.sequences)
    assert cached.sequences.shape[1] == prompt["input_ids"].shape[1] + 24
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), rtol=0, atol=2e-4)

    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(reloaded(**prompt).logits, model(**prompt).logits)
    mine, theirs = model.config.to_dict(), reloaded.config.to_dict()
    for fields in (mine, theirs):
        fields.pop("_name_or_path")
    assert mine == theirs
