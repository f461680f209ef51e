"""Streamed weights give the same plan; what a placement needs is checked before anything moves."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from laco_train.collapse import collapse_model, make_plan
from laco_train.collapse.decoder import decoder_of
from laco_train.collapse.placement import Sizes, Streamed, resolve, rest_on
from laco_train.collapse.search import laco
from laco_train.collapse.similarity import calibration_batch
from laco_train.collapse.walk import Walk
from laco_train.errors import InputError
from laco_train.settings import CollapseSettings

SENTENCES = ["The river rises in the northern hills.", "A tokenizer splits text into pieces."]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LAYER, REST, GIB = 400 * 2**20, 500 * 2**20, 2**30


def settings(**changes: Any) -> CollapseSettings:
    values: dict[str, Any] = {"layers_per_merge": 3, "similarity_threshold": 0.2, "calibration": SENTENCES}
    return CollapseSettings(**{**values, **changes})


@pytest.mark.parametrize("threshold", [1.0, 0.3, -1.0])
@pytest.mark.parametrize("rule", ["rdsc", "drop"])
def test_streamed_search_decides_alike(
    tiny_llama: Callable[..., LlamaForCausalLM], tiny_tokenizer: Any, threshold: float, rule: str
) -> None:
    plans = []
    for placement in ("device", "stream"):
        model = tiny_llama(layers=8)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        s = settings(similarity_threshold=threshold, merge_rule=rule, placement=placement)
        plans.append(make_plan(model, tiny_tokenizer, s))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    on_device, streamed = plans
    assert streamed.merges == on_device.merges
    assert streamed.lineage == on_device.lineage
    assert [c.similarity for c in streamed.candidates] == [c.similarity for c in on_device.candidates]


def test_streamed_collapse_gives_the_same_weights(
    tiny_llama: Callable[..., LlamaForCausalLM], tiny_tokenizer: Any
) -> None:
    models = [
        collapse_model(tiny_llama(layers=8), tiny_tokenizer, settings(placement=placement))[0]
        for placement in ("device", "stream")
    ]
    assert models[0].config.num_hidden_layers < 8
    expected = models[1].state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in models[0].state_dict().items())


def sweep_bytes(model: LlamaForCausalLM, tokenizer: Any, s: CollapseSettings, monkeypatch: pytest.MonkeyPatch) -> float:
    """Bytes that a search streams, in sweeps over all layers, when trials are made ahead as on a GPU."""
    monkeypatch.setattr(Walk, "trials_ahead", 100)
    monkeypatch.setattr(Walk, "trials_at_once", 4)
    decoder = decoder_of(model)
    placement = Streamed(CPU, s.layers_per_merge + 2)
    with rest_on(decoder, CPU), torch.no_grad():
        found = laco(Walk(decoder, calibration_batch(tokenizer, SENTENCES), s, placement), s, None, None)
    accepted = sum(candidate.accepted for candidate in found.candidates)
    one_sweep = sum(p.numel() * p.element_size() for p in decoder.stack.parameters())
    return placement.bytes_moved / one_sweep - accepted


def test_nothing_accepted_moves_each_layer_once(
    tiny_llama: Callable[..., LlamaForCausalLM], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sweep_bytes(tiny_llama(layers=8), tiny_tokenizer, settings(similarity_threshold=1.0), monkeypatch) == 1.0


def test_an_accepted_merge_costs_at_most_one_more_sweep(
    tiny_llama: Callable[..., LlamaForCausalLM], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sweep_bytes(tiny_llama(layers=8), tiny_tokenizer, settings(similarity_threshold=-1.0), monkeypatch) <= 1.0


def test_at_most_so_many_layers_are_there_at_once(
    tiny_llama: Callable[..., LlamaForCausalLM], tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 0
    fetch = Streamed._fetch

    def watched(self: Streamed, slot: Any) -> None:
        nonlocal most
        fetch(self, slot)
        most = max(most, len(self._here))

    monkeypatch.setattr(Streamed, "_fetch", watched)
    make_plan(tiny_llama(layers=8), tiny_tokenizer, settings(placement="stream"))
    assert most == 3 + 2


def test_auto_streams_what_does_not_fit() -> None:
    sizes = Sizes(LAYER, REST, 32)
    assert resolve("auto", sizes, CUDA, 4, 80 * GIB) == "device"
    assert resolve("auto", sizes, CUDA, 4, 4 * GIB) == "stream"
    assert resolve("auto", sizes, CPU, 4, 0) == "device"


@pytest.mark.parametrize(("placement", "free"), [("device", 4 * GIB), ("stream", 2 * GIB), ("auto", 2 * GIB)])
def test_placement_that_cannot_fit(placement: Any, free: int) -> None:
    with pytest.raises(InputError) as error:
        resolve(placement, Sizes(LAYER, REST, 32), CUDA, 4, free)
    assert error.value.key == "collapse.placement"
    assert ("set it to stream" in str(error.value)) == (placement == "device")


def test_streamline_is_not_streamed(tiny_llama: Callable[..., LlamaForCausalLM], tiny_tokenizer: Any) -> None:
    s = settings(strategy="streamline", similarity_threshold=None, target_depth=5, placement="stream")
    with pytest.raises(InputError, match=r"collapse\.placement"):
        make_plan(tiny_llama(layers=8), tiny_tokenizer, s)
