"""benchmarks/sublayers.py: what it composes and measures against the model itself, and the script as a whole."""

import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from laco_train.refine.windows import Window

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))  # its scripts import each other by name

import common  # noqa: E402
import sublayers  # noqa: E402
from sublayers import Halves, composed, cuts, greedy, named, pairs, windows_of, without  # noqa: E402
from windows import loss_of  # noqa: E402


@given(st.data())
def test_pairs_leave_halves_that_alternate_in_order(data: st.DataObject) -> None:
    depth = data.draw(st.integers(2, 8))
    kept = tuple(range(2 * depth))
    for left in range(depth, 1, -1):
        kept = without(kept, data.draw(st.sampled_from(pairs(kept, whole=False))))
        assert len(kept) == 2 * (left - 1)
        assert [at % 2 for at in kept] == [0, 1] * (left - 1)
        assert list(kept) == sorted(kept)
        windows = windows_of(kept, depth)
        starts = [at // 2 for at in kept[::2]]
        assert all(starts[w.layer] == w.first < w.last < [*starts, depth][w.layer + 1] for w in windows)
        # all that went after the first layer left is in some window
        assert sum(w.last - w.first for w in windows) == depth - starts[0] - len(starts)


def test_names_and_places_of_cuts() -> None:
    assert [named(kept, 4) for kept in cuts(4, 2, whole=True)] == ["a0-m1", "a1-m2", "a2-m3"]
    assert [named(kept, 4) for kept in cuts(4, 2, whole=False)] == ["a0-m1", "m0-a2", "a1-m2", "m1-a3", "a2-m3"]
    assert named((0, 3, 6, 7), 4) == "m0-a1,a2-m2"
    assert windows_of((0, 3, 6, 7), 4) == [Window(0, 0, 2)]


def batches(rows: int = 2) -> list[dict[str, torch.Tensor]]:
    """Two batches of two documents each, some tokens of which are no targets."""
    torch.manual_seed(0)
    found = []
    for _ in range(2):
        ids = torch.randint(0, 97, (rows, 12))
        labels = ids.clone()
        labels[:, 6] = -100
        places = torch.cat([torch.arange(6), torch.arange(6)])[None].expand(rows, 12)
        found.append({"input_ids": ids, "labels": labels, "position_ids": places})
    return found


def test_losses_are_those_of_the_composed_models(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    model = tiny_llama(layers=5).eval()
    halves, full = Halves.of(model, batches()), tuple(range(10))
    once = without(full, 3)  # an MLP and the attention after it
    for kept in (full, once):
        choices = [without(kept, at) for at in pairs(kept, whole=False)]
        for choice, loss in zip(choices, halves.losses(kept, choices), strict=True):
            assert loss == pytest.approx(loss_of(composed(model, choice), batches()), abs=1e-5), choice


def test_composed_takes_attention_of_one_and_mlp_of_another(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    model = tiny_llama(layers=4)
    layer = composed(model, (0, 3, 6, 7)).model.layers[0]
    first, second = model.model.layers[0], model.model.layers[1]
    assert torch.equal(layer.self_attn.q_proj.weight, first.self_attn.q_proj.weight)
    assert torch.equal(layer.mlp.down_proj.weight, second.mlp.down_proj.weight)
    assert not torch.equal(layer.mlp.down_proj.weight, first.mlp.down_proj.weight)


def test_greedy_takes_the_least_each_time(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    model, kept = tiny_llama(layers=4).eval(), tuple(range(8))
    for _ in range(2):
        kept = min(
            (without(kept, at) for at in pairs(kept, False)), key=lambda k: loss_of(composed(model, k), batches())
        )
    found, looked = greedy(Halves.of(model, batches()), 4, 2, whole=False)
    assert found == kept
    assert looked[-1] == (named(kept, 4), pytest.approx(loss_of(composed(model, kept), batches()), abs=1e-5))


def test_the_script_as_a_whole(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_llama: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for part in (tiny_llama(layers=5), tiny_tokenizer):
        part.save_pretrained(tmp_path / "model")
    texts = {"train": "The mill stands by the river. " * 3000, "held": "A boat went down the stream at dawn. " * 60}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
    monkeypatch.setattr(sublayers, "write_results", partial(common.write_results, folder=tmp_path))
    sizes = ["--calibration-tokens=512", "--choice-tokens=128", "--validation-tokens=256", "--block=32"]
    asked = [f"--save={tmp_path / 'saved'}", "--output=sublayers"]
    files = [f"--train={tmp_path / 'train.txt'}", f"--validation={tmp_path / 'held.txt'}"]

    def called(*more: str) -> None:
        monkeypatch.setattr(sys, "argv", ["sublayers.py", str(tmp_path / "model"), *files, *sizes, *asked, *more])
        sublayers.main()

    called("--removed=2")
    rows = json.loads((tmp_path / "sublayers.json").read_text())["rows"]
    assert [(row["choice"], row["of"]) for row in rows] == [
        (way, of) for way in ("single cut", "greedy") for of in ("whole layers", "halves")
    ]
    assert all(math.isfinite(row["loss"] + row["loss_solved"]) and row["original_loss"] > 0 for row in rows)
    assert [len(row["looked_at"]) for row in rows] == [4, 7, 2, 2]
    assert rows[1]["removed"] == min(rows[1]["looked_at"], key=lambda look: look[1])[0]
    for folder in ("single_cut-whole_layers", "greedy-halves"):
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved" / folder).config.num_hidden_layers == 3
    with pytest.raises(SystemExit) as ended:
        called("--removed=5")
    assert ended.value.code == 2
    assert "5 of 5 layers" in capsys.readouterr().err
