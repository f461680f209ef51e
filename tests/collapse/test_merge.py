"""Merge rules against plain formulas, their rounding, and which parameters of a layer they touch."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from laco_train.collapse import merge
from laco_train.collapse.merge import DROP, merge_tensors, merge_weights, merged_names
from tests.collapse.helpers import RULES, scramble

Llama = Callable[..., LlamaForCausalLM]
# Exact in float64, so that what is left is the error of the float32 arithmetic under test.
FORMULAS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "rdsc": lambda layers: layers[0] + (layers[1:] - layers[0]).sum(0),
    "last": lambda layers: layers[-1],
    "mean": lambda layers: layers.mean(0),
}


@st.composite
def stacks(draw: st.DrawFn, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Tensors of 2 to 6 layers, (layers, rows, columns), of very different scales."""
    shape = draw(st.tuples(st.integers(2, 6), st.integers(1, 5), st.integers(1, 7)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    scales = 10.0 ** torch.randint(-3, 3, (shape[0], 1, 1), generator=generator)
    return (torch.randn(shape, generator=generator) * scales).to(dtype)


def test_every_rule_has_a_formula() -> None:
    assert {*FORMULAS, DROP} == set(RULES) == {*merge.RULES, DROP}


@settings(max_examples=100, deadline=None)
@given(layers=stacks(), rule=st.sampled_from(sorted(FORMULAS)))
def test_rule_is_its_formula(layers: torch.Tensor, rule: str) -> None:
    before = layers.clone()
    merged = merge_tensors(rule, layers[0], list(layers[1:]))
    assert (merged.dtype, merged.shape) == (layers.dtype, layers[0].shape)
    atol = 2e-6 * float(layers.abs().max())
    torch.testing.assert_close(merged.double(), FORMULAS[rule](layers.double()), rtol=0, atol=atol)
    assert torch.equal(layers, before)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), dtype=st.sampled_from([torch.bfloat16, torch.float16]))
def test_half_precision_is_summed_in_float32_and_rounded_once(data: st.DataObject, dtype: torch.dtype) -> None:
    layers = data.draw(stacks(dtype))
    for rule in FORMULAS:
        merged = merge_tensors(rule, layers[0], list(layers[1:]))
        in_float32 = merge_tensors(rule, layers[0].float(), [layer.float() for layer in layers[1:]])
        assert merged.dtype == dtype
        assert torch.equal(merged, in_float32.to(dtype))


def test_rounding_once_differs_from_rounding_each_step() -> None:
    """In bfloat16, 1 + 2^-8 is halfway to the next number and rounds to 1, however often it is added."""
    base = torch.zeros(1, dtype=torch.bfloat16)
    rest = [torch.full((1,), value, dtype=torch.bfloat16) for value in (1.0, *[2.0**-8] * 4)]
    assert merge_tensors("rdsc", base, rest).item() == 1 + 4 * 2.0**-8


@pytest.mark.parametrize("rule", sorted(FORMULAS))
def test_pieces_do_not_show(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor larger than the working copy, of a length that the pieces don't divide, and not contiguous."""
    layers = torch.randn(3, 7, 11, generator=torch.Generator().manual_seed(1)).transpose(1, 2)
    whole = merge_tensors(rule, layers[0], list(layers[1:]))
    monkeypatch.setattr(merge, "_CHUNK", 10)
    assert torch.equal(merge_tensors(rule, layers[0], list(layers[1:])), whole)
    torch.testing.assert_close(whole, FORMULAS[rule](layers))


@pytest.mark.parametrize("merge_norms", [False, True])
def test_norms_merge_only_when_asked(tiny_llama: Llama, merge_norms: bool) -> None:
    layer = tiny_llama(layers=2, attention_bias=True).model.layers[0]
    projections = {f"self_attn.{p}_proj.{kind}" for p in "qkvo" for kind in ("weight", "bias")}
    projections |= {f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")}
    norms = {"input_layernorm.weight", "post_attention_layernorm.weight"}
    assert set(merged_names(layer, merge_norms)) == (projections | norms if merge_norms else projections)


@pytest.mark.parametrize("rule", RULES)
def test_weights_of_whole_layers(tiny_llama: Llama, rule: str) -> None:
    model = scramble(tiny_llama(layers=4), seed=1)
    weights = [dict(layer.named_parameters()) for layer in model.model.layers]
    names = merged_names(model.model.layers[0], merge_norms=True)
    merged = merge_weights(rule, weights, names)
    assert set(merged) == (set() if rule == DROP else set(names))
    for name, tensor in merged.items():
        assert not tensor.requires_grad
        stacked = torch.stack([weight[name].detach() for weight in weights])
        torch.testing.assert_close(tensor, FORMULAS[rule](stacked))
