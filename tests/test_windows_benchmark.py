"""benchmarks/windows.py: its choices against all there are, and the script as a whole."""

import itertools
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from laco_train.errors import InputError

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))  # its scripts import each other by name

import common  # noqa: E402
import windows  # noqa: E402
from windows import Costs, Span, cheapest, greedy  # noqa: E402


def all_choices(costs: Costs, removed: int) -> list[tuple[Span, ...]]:
    """Every set of windows apart from each other that removes so many layers."""
    found = []
    for count in range(removed + 1):
        for chosen in itertools.combinations(sorted(costs), count):
            apart = all(a[1] < b[0] for a, b in itertools.pairwise(chosen))
            if apart and sum(last - first for first, last in chosen) == removed:
                found.append(chosen)
    return found


@st.composite
def tables(draw: st.DrawFn) -> tuple[Costs, int, int]:
    depth = draw(st.integers(2, 6))
    spans = [(a, b) for a in range(depth) for b in range(a + 1, depth)]
    measured = draw(st.lists(st.sampled_from(spans), unique=True))
    costs = {span: draw(st.floats(-1, 10).map(lambda cost: round(cost, 3))) for span in measured}
    return costs, depth, draw(st.integers(1, depth - 1))


@given(tables())
def test_cheapest_is_the_least_of_all(table: tuple[Costs, int, int]) -> None:
    costs, depth, removed = table
    every = all_choices(costs, removed)
    if not every:
        with pytest.raises(InputError, match="--removed"):
            cheapest(costs, depth, removed)
        return
    chosen = tuple(cheapest(costs, depth, removed))
    assert chosen in every
    least = min(sum(costs[span] for span in choice) for choice in every)
    assert sum(costs[span] for span in chosen) == pytest.approx(least)


@given(tables())
def test_greedy_is_a_choice_and_never_cheaper(table: tuple[Costs, int, int]) -> None:
    costs, depth, removed = table
    try:
        chosen = tuple(greedy(costs, depth, removed))
    except InputError:
        return  # it may have joined what cannot be joined further
    assert chosen in all_choices(costs, removed)
    assert sum(costs[s] for s in chosen) >= sum(costs[s] for s in cheapest(costs, depth, removed)) - 1e-9


def test_greedy_may_miss_the_best() -> None:
    costs = {(0, 1): 1.0, (1, 2): 0.9, (2, 3): 1.0, (0, 2): 5.0, (1, 3): 5.0, (0, 3): 9.0}
    assert cheapest(costs, 4, 2) == [(0, 1), (2, 3)]
    assert greedy(costs, 4, 2) in ([(0, 2)], [(1, 3)])


def test_the_script_as_a_whole(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_llama: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    for part in (tiny_llama(layers=6), tiny_tokenizer):
        part.save_pretrained(tmp_path / "model")
    texts = {"train": "The mill stands by the river. " * 3000, "held": "A boat went down the stream at dawn. " * 60}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
    monkeypatch.setattr(windows, "write_results", partial(common.write_results, folder=tmp_path))
    sizes = ["--calibration-tokens=512", "--choice-tokens=128", "--validation-tokens=256", "--block=32"]
    asked = ["--removed=2", "--longest=3", "--beside", "1-3", "--output=windows"]
    files = [f"--train={tmp_path / 'train.txt'}", f"--validation={tmp_path / 'held.txt'}"]
    monkeypatch.setattr(sys, "argv", ["windows.py", str(tmp_path / "model"), *files, *sizes, *asked])
    windows.main()
    rows = json.loads((tmp_path / "windows.json").read_text())["rows"]
    assert [row["choice"] for row in rows] == ["cheapest", "greedy", "1-3", "each window alone"]
    costs = {(first, last): cost for first, last, cost in rows[-1]["costs"]}
    assert set(costs) == {(a, b) for a in range(6) for b in (a + 1, a + 2) if b < 6}
    assert rows[0]["costs_added"] == min(sum(costs[s] for s in choice) for choice in all_choices(costs, 2))
    assert rows[2]["costs_added"] == costs[1, 3]
    assert all(math.isfinite(row["loss_solved"]) and row["original_loss"] > 0 for row in rows[:3])
