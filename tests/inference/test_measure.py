"""Models measured in turns: the real ones run, at several batch sizes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from laco_train.inference.load import load_as_saved
from laco_train.inference.measure import Measured, Turn, Workload, measure
from laco_train.inference.result import Bench
from tests.collapse.tiny import tiny

CPU = torch.device("cpu")
WORK = Workload(batches=(1, 3), prompt=16, new=4, turns=2)


def test_models_take_turns(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    loaded: list[str] = []

    def load(name: str, layers: int) -> LlamaForCausalLM:
        loaded.append(name)
        return tiny_llama(layers=layers)

    turns: list[tuple[int, int]] = []
    models = {"small": partial(load, "small", 2), "large": partial(load, "large", 6)}
    found = measure(models, WORK, CPU, lambda done, of: turns.append((done, of)))
    assert loaded == ["small", "large", "small", "large"]
    assert turns == [(1, 4), (2, 4), (3, 4), (4, 4)]
    small, large = found["small"], found["large"]
    assert isinstance(small, Measured) and isinstance(large, Measured)
    assert (small.layers, large.layers, small.dtype) == (2, 6, "float32")
    for model in (small, large):
        for batch, done in zip(WORK.batches, model.turns, strict=True):
            assert len(done) == 2
            for turn in done:
                assert isinstance(turn, Turn)
                assert turn.prefill == pytest.approx(batch * 16 / turn.first)
                assert turn.decode > 0


def test_memory_is_weights_and_a_cache_that_grows_with_the_batch(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    found = measure({"model": lambda: tiny_llama(layers=3)}, WORK, CPU)["model"]
    assert isinstance(found, Measured)
    for batch, (turn, _) in zip(WORK.batches, found.turns, strict=True):
        assert isinstance(turn, Turn)
        cache = 2 * 3 * batch * (16 + 4) * 2 * 8 * 4  # keys and values, layers, tokens, heads of 8, float32
        rest = turn.gib * 2**30 - 4 * found.parameters - cache
        assert 0 <= rest < 1024  # tables of rotary angles besides


def test_all_positions_are_enough() -> None:
    """Of a model that has no others: prompt and new tokens are all that it is asked for."""
    work = Workload(batches=(1,), prompt=255, new=1, turns=1)
    found = measure({"gpt2": lambda: tiny("gpt2")}, work, CPU)["gpt2"]
    assert isinstance(found, Measured)
    ((turn,),) = found.turns
    assert isinstance(turn, Turn)


def test_one_that_fails_costs_the_others_nothing(tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path) -> None:
    class NoRoom(LlamaForCausalLM):
        def forward(self, input_ids: torch.Tensor, **kwargs: object) -> object:  # type: ignore[override]
            if input_ids.shape[0] > 1:
                raise torch.OutOfMemoryError("no room\nfor this")
            return super().forward(input_ids, **kwargs)  # type: ignore[arg-type]

    models: dict[str, Callable[[], LlamaForCausalLM]] = {
        "good": tiny_llama,
        "narrow": lambda: NoRoom(tiny_llama().config).eval(),
        "missing": lambda: load_as_saved(str(tmp_path)),  # type: ignore[dict-item,return-value]
    }
    found = measure(models, WORK, CPU)
    narrow, missing = found["narrow"], found["missing"]
    assert isinstance(narrow, Measured) and isinstance(missing, str)
    assert len(narrow.turns[0]) == 2
    assert narrow.turns[1] == "no room"
    assert "no config.json" in missing
    assert isinstance(found["good"], Measured)


def turns(*pairs: tuple[float, float]) -> tuple[Turn, ...]:
    return tuple(Turn(first=1 / speed, prefill=speed, decode=speed, gib=gib) for speed, gib in pairs)


def test_ratios_are_turn_by_turn() -> None:
    one = Measured(4, 100, "float32", (turns((10, 2), (100, 2), (10, 2)), "no room"))
    other = Measured(2, 50, "float32", (turns((20, 1), (200, 1), (30, 1)), turns((5, 1), (5, 1), (5, 1))))
    bench = Bench({}, {"one": one, "other": other}, Workload((1, 8), turns=3), "CPU", "", {})
    found = bench.figures("other", 1)
    assert isinstance(found, dict)
    decode = found["decode_tokens_per_second"]
    assert (decode.median, decode.low, decode.high) == (30, 20, 200)
    assert decode.ratio == 2  # of the medians it would be 3
    assert found["gib"].ratio == 0.5
    assert bench.figures("one", 8) == "no room"
    alone = bench.figures("other", 8)
    assert isinstance(alone, dict)
    assert alone["decode_tokens_per_second"].ratio is None


def test_type_as_saved_or_as_named(tiny_folder: Callable[..., Path]) -> None:
    folder = tiny_folder()
    half = tiny_folder(load_as_saved(str(folder)).to(torch.bfloat16), name="half")
    assert load_as_saved(str(folder)).dtype == torch.float32
    assert load_as_saved(str(half)).dtype == torch.bfloat16
    assert load_as_saved(str(half), "float16").dtype == torch.float16
