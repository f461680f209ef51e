"""The width-pruned rival: `pip install --no-deps torch-pruning==1.6.1`, `pytest tests/test_width_rival.py`."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

pytest.importorskip("torch_pruning")
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from width import least, prune_attention, prune_mlp, taylor, trained, width_pruned

IDS = torch.arange(24).view(2, 12) % 40


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=8,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


class Letters:
    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 40 for letter in text]}


def test_a_pruned_model_is_the_original_with_silent_heads_and_channels():
    model, silenced = tiny(), tiny()
    for one in (model, silenced):
        one(input_ids=IDS, labels=IDS).loss.backward()
    for layer in silenced.model.layers:
        mlp, attention = layer.mlp, layer.self_attn
        scores = [taylor(p.weight).sum(1) for p in (mlp.gate_proj, mlp.up_proj)] + [taylor(mlp.down_proj.weight).sum(0)]
        heads = [taylor(p.weight).sum(1).view(3, -1).sum(1) for p in (attention.q_proj, attention.k_proj)]
        heads += [taylor(attention.v_proj.weight).sum(1).view(3, -1).sum(1)]
        heads += [taylor(attention.o_proj.weight).sum(0).view(3, -1).sum(1)]
        with torch.no_grad():
            mlp.down_proj.weight[:, least(sum(scores), 5)] = 0
            attention.o_proj.weight.view(24, 3, 16)[:, least(sum(heads), 1)] = 0
    for layer in model.model.layers:
        prune_mlp(layer.mlp, 5)
        prune_attention(layer.self_attn, 3, 1)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, silenced(input_ids=IDS).logits, atol=1e-6, rtol=1e-5)


def test_a_pruned_model_is_saved_and_loaded_at_the_size_asked_for(tmp_path):
    model = tiny()
    before = sum(p.numel() for p in model.parameters())
    pruned = width_pruned(model, Letters(), ["one sample", "another"], before // 4)
    left = sum(p.numel() for p in pruned.parameters())
    assert abs(before - before // 4 - left) <= 3 * 3 * 24
    assert pruned.config.num_key_value_heads < 3 or pruned.config.intermediate_size < 32
    pruned.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, pruned(input_ids=IDS).logits)


def test_what_training_made_of_it(tmp_path: Path) -> None:
    run = tmp_path / "width_0.27" / "version_0"
    run.mkdir(parents=True)
    scores = [
        {"tokens": tokens, "task": task, "value": value, "error": 0.01}
        for tokens, task, value in ((0, "piqa", 0.5), (64, "piqa", 0.6), (64, "sciq", 0.8))
    ]
    validation = [{"tokens": 0, "loss": 8.0}, {"tokens": 64, "loss": 3.5}]
    summary = {"parameters": {"after": 7}, "depth": 30, "validation": validation, "evaluation": scores}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "config.yaml").write_text("model: {optimizer: {learning_rate: 3.0e-4}}\nevaluation: {limit: 300}\n")
    row = trained(run)
    assert (row["case"], row["ratio"], row["loss"]) == ("width at 0.27, trained", 0.27, 3.5)
    assert row["accuracies"] == {"piqa": [0.6, 0.01], "sciq": [0.8, 0.01]}
    assert row["mean_accuracy"] == pytest.approx(0.7)
    assert (row["learning_rate"], row["questions"]) == (3e-4, 300)
