"""The oracles check themselves, and each other where the paper and the published code agree."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from tests.collapse.helpers import TEXTS, Case, cases, scramble, token_ids
from tests.oracles.layer_collapse import is_norm, layer_collapse, merge_layers
from tests.oracles.published import published_collapse, published_merge


@torch.no_grad()
def relative_gap(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over the largest entry of `b`."""
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_published_loop_telescopes_to_the_last_projections_with_the_first_norms(
    tiny_llama: Callable[..., LlamaForCausalLM], count: int
) -> None:
    model = scramble(tiny_llama(layers=6), seed=1)
    result = published_merge(model, 1, count)
    assert len(result.model.layers) == 6 - count
    first, last = model.model.layers[1], model.model.layers[1 + count]
    for name, parameter in result.model.layers[1].named_parameters():
        if is_norm(name):
            assert torch.equal(parameter, first.get_parameter(name))
            assert not torch.equal(parameter, last.get_parameter(name))
        else:
            assert relative_gap(parameter, last.get_parameter(name)) < 1e-6


@pytest.mark.parametrize("C", [2, 3, 4])
def test_rdsc_is_last_for_two_layers_only(tiny_llama: Callable[..., LlamaForCausalLM], C: int) -> None:
    model = scramble(tiny_llama(layers=6), seed=2)
    rdsc = merge_layers(model, 1, C - 1, "rdsc", merge_norms=False).model.layers[1]
    last = merge_layers(model, 1, C - 1, "last", merge_norms=False).model.layers[1]
    for name, parameter in rdsc.named_parameters():
        gap = relative_gap(parameter, last.get_parameter(name))
        if is_norm(name):
            assert gap == 0
        elif C == 2:
            assert gap < 1e-6
        else:
            assert gap > 0.1


@settings(max_examples=25, deadline=None)
@given(case=cases())
def test_both_oracles_walk_alike_where_the_texts_agree(
    tiny_llama: Callable[..., LlamaForCausalLM], tiny_tokenizer: PreTrainedTokenizerBase, case: Case
) -> None:
    """`last` is the published merge (so is `rdsc` for C = 2), and for I >= C - 1 neither walk reaches its clamp."""
    rule, interval = "rdsc" if case.C == 2 else "last", max(case.I, case.C - 1)
    model = scramble(tiny_llama(layers=case.depth), case.seed)
    samples = token_ids(tiny_tokenizer, list(case.texts))
    letters = {"C": case.C, "T": case.T}
    paper = layer_collapse(model, samples, L=case.L, H=case.H, I=interval, rule=rule, **letters)
    assume(all(abs(c.similarity - case.T) > 1e-4 for c in paper.candidates))
    code = published_collapse(model, samples, L=case.L - 1, H=case.H - 1, interval=interval, **letters)
    assert [(c.layer, c.absorbed, c.accepted) for c in code.candidates] == [
        (c.layer, c.absorbed, c.accepted) for c in paper.candidates
    ]
    assert [c.similarity for c in code.candidates] == pytest.approx([c.similarity for c in paper.candidates], abs=1e-5)
    assert code.lineage == paper.lineage
    for name, parameter in code.model.named_parameters():
        torch.testing.assert_close(parameter, paper.model.get_parameter(name), rtol=0, atol=3e-6)


def test_walks_differ_after_an_accepted_merge_of_many_layers(
    tiny_llama: Callable[..., LlamaForCausalLM], tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    """9 layers, C = 4, I = 1, all accepted, from 0: after 4 the paper clamps to 6 - 4 - 1 = 1, the code tries 3."""
    model, samples = scramble(tiny_llama(layers=9), seed=3), token_ids(tiny_tokenizer, TEXTS[:1])
    paper = layer_collapse(model, samples, C=4, L=1, H=9, I=1, T=-1, rule="last")
    code = published_collapse(model, samples, C=4, L=0, H=8, interval=1, T=-1)
    assert [(c.layer, c.absorbed) for c in paper.candidates] == [(4, 3), (1, 3)]
    assert paper.lineage == [[0], [1, 2, 3, 4, 5, 6, 7], [8]]
    assert [(c.layer, c.absorbed) for c in code.candidates] == [(4, 3), (3, 2), (2, 1), (1, 1), (0, 1)]


def test_paper_example_leaves_the_last_layer_alone(
    tiny_llama: Callable[..., LlamaForCausalLM], tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    """H = 8 of 8 with C = 4 starts at l = 4 from 1 and merges layers 5 to 7 into it."""
    model, samples = scramble(tiny_llama(layers=8), seed=4), token_ids(tiny_tokenizer, TEXTS[:1])
    result = layer_collapse(model, samples, C=4, L=4, H=8, I=1, T=-1)
    assert [(c.layer, c.absorbed, c.accepted) for c in result.candidates] == [(3, 3, True)]
    assert result.lineage == [[0], [1], [2], [3, 4, 5, 6], [7]]
    assert result.model.config.num_hidden_layers == len(result.model.model.layers) == 5
