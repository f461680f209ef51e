"""benchmarks/merges.py: its arithmetic on random layers with grouped key-value heads, and the script as a whole."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from laco_train.errors import InputError

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))  # its scripts import each other by name

import common  # noqa: E402
import merges  # noqa: E402
from merge_rules import (  # noqa: E402
    ATTENTION_NORM,
    BIASES,
    MATRICES,
    MLP_NORM,
    NAMES,
    Contribution,
    Given,
    Parts,
    aligned,
    folded,
    heads_of,
    influence_weights,
    merge,
    parts_of,
    queries_of,
    refuse_unlike_llama,
    taken,
)

Llama = Callable[..., LlamaForCausalLM]
Model = LlamaForCausalLM | Qwen2ForCausalLM
IDS = torch.arange(40).view(2, 20) % 37
SIZES = {
    "vocab_size": 40,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
}


@pytest.fixture(params=["llama", "qwen2"])
def model(request: pytest.FixtureRequest, tiny_llama: Llama) -> Model:
    """Three groups of two query heads, with biases in Qwen2; norms and biases are random too."""
    torch.manual_seed(1)
    sizes = {name: size for name, size in SIZES.items() if name != "num_hidden_layers"}
    made: Model = (
        tiny_llama(layers=3, **sizes)
        if request.param == "llama"
        else Qwen2ForCausalLM(Qwen2Config(**SIZES, initializer_range=0.1)).eval()
    )
    with torch.no_grad():
        for weight in made.parameters():
            if weight.ndim == 1:
                weight.copy_(0.5 + torch.rand_like(weight))
    assert any(name in parts_of(made.model.layers[0]) for name in BIASES) == (request.param == "qwen2")
    return made


@torch.no_grad()
def logits(model: Model) -> Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def shuffled(model: Model, at: int) -> Parts:
    """Layer `at` with groups, query heads within groups, and neurons in another order."""
    heads = heads_of(model.config)
    groups, neurons = torch.tensor([2, 0, 1]), torch.randperm(64)
    queries = queries_of(groups, heads.queries).view(3, 2)
    queries[1] = queries[1].flip(0)
    return taken(parts_of(model.model.layers[at]), queries.flatten(), groups, neurons, heads.size)


def given(model: Model, window: range, rank: int = 64) -> Given:
    contributions = [Contribution(0.1 * (at + 1), torch.rand(3), torch.rand(64)) for at in window]
    return Given([parts_of(model.model.layers[at]) for at in window], contributions, heads_of(model.config), rank)


def assert_same(found: Parts, expected: Parts, **tolerance: float) -> None:
    assert found.keys() <= expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], **tolerance, msg=lambda text, name=name: name + text)


def test_permuting_heads_and_neurons_leaves_the_function(model: Model) -> None:
    before = logits(model)
    parts = shuffled(model, 1)
    changed = [name for name, weight in parts_of(model.model.layers[1]).items() if not torch.equal(weight, parts[name])]
    assert {*changed} == {name for name in parts if name not in (ATTENTION_NORM, MLP_NORM)}
    model.model.layers[1].load_state_dict(parts)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


def test_folding_leaves_the_function(model: Model) -> None:
    """A layer with another's norms in place of its own."""
    before = logits(model)
    parts = folded(parts_of(model.model.layers[1]), parts_of(model.model.layers[0]))
    assert not torch.equal(parts[ATTENTION_NORM], model.model.layers[1].input_layernorm.weight)
    model.model.layers[1].load_state_dict(parts)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["aligned_mean", "aligned_rdsc"])
def test_a_layer_and_a_permuted_copy_of_it_give_it_back(rule: str, model: Model) -> None:
    first, copies = parts_of(model.model.layers[1]), [shuffled(model, 1), shuffled(model, 1)]
    for copy in copies:
        assert_same(aligned(copy, first, heads_of(model.config)), first, rtol=0.0, atol=0.0)
    about = given(model, range(3))
    found = merge(rule, Given([first, *copies], about.contributions, about.heads, 64))
    assert {*MATRICES} <= found.keys()
    assert_same(found, first, rtol=1e-6, atol=1e-8)  # three equal numbers summed and divided by three


def test_alignment_of_another_layer_leaves_the_function_and_comes_nearer(model: Model) -> None:
    before = logits(model)
    first, later = (parts_of(model.model.layers[at]) for at in range(2))
    found = aligned(later, first, heads_of(model.config))

    def distance(parts: Parts) -> float:
        norms = {name: first[norm] if norm else torch.ones(1) for name, (_, _, norm) in MATRICES.items()}
        return sum(float(((parts[name] - first[name]) * norm).square().sum()) for name, norm in norms.items())

    assert distance(found) < distance(folded(later, first))
    model.model.layers[1].load_state_dict(found)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)


def test_selecting_from_one_layer_gives_that_layer(model: Model) -> None:
    assert_same(merge("select", given(model, range(1, 2))), parts_of(model.model.layers[1]), rtol=0.0, atol=0.0)


def test_selecting_all_of_the_second_layer_computes_what_it_does(model: Model) -> None:
    window = given(model, range(2))
    most = [
        Contribution(0.1, torch.full((3,), float(at)), torch.full((64,), float(at)))
        for at, _ in enumerate(window.layers)
    ]
    found = merge("select", Given(window.layers, most, window.heads, 64))
    assert_same(found, folded(window.layers[1], window.layers[0]), rtol=0.0, atol=0.0)


def test_scaled_rdsc_has_the_norms_of_the_first_layer(model: Model) -> None:
    window = given(model, range(3))
    found, plain = merge("rdsc_norm", window), merge("rdsc", window)
    for name, weight in found.items():
        torch.testing.assert_close(weight.norm(), window.layers[0][name].norm())
        cosine = torch.nn.functional.cosine_similarity(weight.flatten(), plain[name].flatten(), dim=0)
        torch.testing.assert_close(cosine, torch.tensor(1.0))


def test_weights_of_influence_sum_to_one(model: Model) -> None:
    window = given(model, range(3))
    shares = influence_weights(window.contributions)
    assert sum(shares) == pytest.approx(1) and shares == sorted(shares)
    name = "mlp.up_proj.weight"
    expected = sum(share * parts[name] for share, parts in zip(shares, window.layers, strict=True))
    torch.testing.assert_close(merge("influence", window)[name], expected)


def test_low_rank(model: Model) -> None:
    """Full rank is RDSC; less differs from the first layer by that rank."""
    assert_same(
        merge("low_rank", given(model, range(3), 64)), merge("rdsc", given(model, range(3))), rtol=1e-4, atol=1e-5
    )
    found, first = merge("low_rank", given(model, range(3), 4)), parts_of(model.model.layers[0])
    for name in MATRICES:
        assert int(torch.linalg.matrix_rank(found[name] - first[name], rtol=1e-4)) == 4


def test_what_is_not_like_llama_is_refused(model: Model) -> None:
    refuse_unlike_llama(model, [range(3)])
    others = [
        GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=48, n_layer=3, n_head=6)),
        GemmaForCausalLM(GemmaConfig(**SIZES)),  # the same names, but its norms scale by 1 + weight
    ]
    for other in others:
        with torch.no_grad():
            for weight in other.parameters():
                weight.add_(0.3 * torch.rand_like(weight))
        with pytest.raises(InputError, match=r"other parts than Llama's|does more than scale"):
            refuse_unlike_llama(other, [range(3)])


@pytest.mark.parametrize("windows", ["2", "2-2", "3-2", "0-1,1-2", "2-3,0-1", "4-6", "a-b", "1-2-3"])
def test_windows_that_make_no_sense_are_refused(windows: str) -> None:
    with pytest.raises(InputError, match="--windows"):
        merges.parsed(windows, 6)


def test_windows() -> None:
    assert merges.parsed("0-1,3-5", 6) == [range(2), range(3, 6)]


def test_contributions(tiny_llama: Llama) -> None:
    """Against what one layer adds, head group by head group and neuron by neuron."""
    model = tiny_llama(layers=3, seed=4)
    batch = {"input_ids": IDS, "labels": IDS, "position_ids": torch.arange(20).expand(2, 20)}
    found = merges.contributions(model, [1], [batch, batch], heads_of(model.config))[1]
    with torch.no_grad():
        states = model(input_ids=IDS, use_cache=False, output_hidden_states=True).hidden_states
        enters, leaves = states[1].flatten(0, 1), states[2].flatten(0, 1)
        influence = 1 - torch.nn.functional.cosine_similarity(enters, leaves).mean()
        assert found.influence == pytest.approx(float(influence), rel=1e-4)
        layer = model.model.layers[1]
        seen: list[Tensor] = []
        hooks = [
            m.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
            for m in (layer.self_attn.o_proj, layer.mlp.down_proj)
        ]
        model(input_ids=IDS, use_cache=False)
        for hook in hooks:
            hook.remove()
        attended, activations = (each.flatten(0, 1) for each in seen)
        square = leaves.square().sum(1)
        for g in range(2):
            added = attended[:, 16 * g : 16 * g + 16] @ layer.self_attn.o_proj.weight[:, 16 * g : 16 * g + 16].T
            torch.testing.assert_close(found.groups[g], (added.square().sum(1) / square).mean(), rtol=1e-4, atol=1e-8)
        added = activations[:, 5:6] * layer.mlp.down_proj.weight[:, 5]
        torch.testing.assert_close(found.neurons[5], (added.square().sum(1) / square).mean(), rtol=1e-4, atol=1e-8)


def test_the_script(tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rules: rows and models as they come, which load and give the loss that their row says."""
    source = tiny_folder(layers=6)
    text = tmp_path / "text.jsonl"
    words = ("the river", "a tokenizer", "her friend", "three old towns", "the sea", "a single man", "northern hills")
    rows = [" and ".join(words[(i * j) % 7] for j in range(1, 30)) + f" {i}" for i in range(60)]
    text.write_text("\n".join(json.dumps({"text": row}) for row in rows[:40]))
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("\n".join(json.dumps({"text": row}) for row in rows[40:]))
    monkeypatch.setattr(merges, "append_rows", lambda name, rows: common.append_rows(name, rows, tmp_path))
    words = f"merges.py {source} --train {text} --validation {held_out} --windows 1-2,3-5 --windows 0-1 --block 64 "
    words += f"--calibration-tokens 1024 --validation-tokens 512 --output out --save {tmp_path / 'saved'} --rules "
    monkeypatch.setattr(sys, "argv", [*words.split(), *NAMES])
    merges.main()
    found = json.loads((tmp_path / "out.json").read_text())
    assert str(tmp_path) not in json.dumps([row["command"] for row in found["rows"]]).replace(
        str(tmp_path / "saved"), ""
    )
    assert len(found["rows"]) == 2 * 2 * len(NAMES)
    by_case = {(row["windows"], row["rule"], row["closed_form"]): row for row in found["rows"]}
    for solved in (False, True):
        two = by_case["0-1", "rdsc", solved]
        assert two["loss"] == pytest.approx(by_case["0-1", "last", solved]["loss"], rel=1e-4)
    assert all(len(row["errors"]) == len(row["windows"].split(",")) for row in found["rows"])
    row = by_case["1-2,3-5", "select", True]
    assert sum(row["errors"]) < sum(by_case["1-2,3-5", "select", False]["errors"])
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved" / "1-2_3-5-select-solved")
    assert saved.config.num_hidden_layers == 3 and len(saved.model.layers) == 3
    options = merges.arguments().parse_args(
        [
            str(source),
            "--train",
            str(text),
            "--validation",
            str(held_out),
            "--block",
            "64",
            "--validation-tokens",
            "512",
        ]
    )
    _, validation = merges.blocks(options, merges.load_tokenizer(str(source)))
    loss = merges.mean_loss(saved.eval(), validation, merges.PLACE.device, merges.PLACE.context).loss
    assert loss == pytest.approx(row["loss"], rel=1e-5)
    monkeypatch.setattr(sys, "argv", [*words.replace("0-1", "5-6").split(), "drop"])
    with pytest.raises(SystemExit, match="2"):
        merges.main()
