"""Whatever differs between the folder and the model is found and named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from laco_train.collapse import CollapsePlan
from laco_train.errors import TrainingStopped
from laco_train.export import Proof, cpu_copy, prove
from laco_train.export.huggingface import write_folder
from laco_train.export.runtime_proof import prompts_for, text_logits

Change = Callable[[Any], None]
NORM = "model.layers.1.input_layernorm.weight"


class Written:
    """A written folder, and the copy it was written from."""

    def __init__(
        self,
        folder: Path,
        model: LlamaForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        plan: CollapsePlan,
    ):
        self.folder, self.tokenizer, self.plan = folder, tokenizer, plan
        self.duplicate = cpu_copy(model, torch.bfloat16)
        write_folder(self.duplicate, tokenizer, folder, plan=plan)

    def change_weights(self, change: Change) -> None:
        weights = load_file(self.folder / "model.safetensors")
        change(weights)
        save_file(weights, self.folder / "model.safetensors", metadata={"format": "pt"})

    def change_json(self, name: str, change: Change) -> None:
        path = self.folder / name
        values = json.loads(path.read_text(encoding="utf-8"))
        change(values)
        path.write_text(json.dumps(values), encoding="utf-8")

    def prove(self) -> Proof:
        return prove(self.folder, self.duplicate, self.tokenizer, self.plan)

    def fails(self, pattern: str) -> None:
        with pytest.raises(
            TrainingStopped, match=f"^export: the proof failed, nothing was exported: {pattern}"
        ) as caught:
            self.prove()
        assert "\n" not in str(caught.value)


@pytest.fixture
def written(tmp_path: Path, collapsed: Callable[..., tuple], tiny_tokenizer: PreTrainedTokenizerFast) -> Written:
    model, plan = collapsed()
    return Written(tmp_path / "x", model, tiny_tokenizer, plan)


def test_an_untouched_folder_is_proven(written: Written) -> None:
    proof = written.prove()
    assert proof.tensors == len(written.duplicate.state_dict())
    assert (proof.prompts, proof.generated_tokens, proof.flips, proof.max_logit_difference) == (5, 5 * 64, 0, 0)
    assert proof.lines()[1:3] == [
        "logits of 5 prompts and their greedy tokens equal, largest difference 0",
        "320 greedy tokens as of the model in memory, equal with and without a KV cache (no flip)",
    ]


def test_few_positions_mean_fewer_tokens(
    tmp_path: Path, collapsed: Callable[..., tuple], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model, plan = collapsed(max_position_embeddings=32)
    assert Written(tmp_path / "x", model, tiny_tokenizer, plan).prove().generated_tokens == 5 * 16


def set_nan(weights: dict[str, torch.Tensor]) -> None:
    weights[NORM][0] = float("nan")


def flip_zero(weights: dict[str, torch.Tensor]) -> None:
    weights["model.embed_tokens.weight"][1] *= -1  # the row of padding: 0 becomes -0


def swap(weights: dict[str, torch.Tensor]) -> None:
    first, second = (f"model.layers.{index}.mlp.down_proj.weight" for index in (0, 1))
    weights[first], weights[second] = weights[second], weights[first]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (set_nan, rf"{NORM} differs"),
        (flip_zero, r"model\.embed_tokens\.weight differs"),
        (swap, r"model\.layers\.0\.mlp\.down_proj\.weight differs"),
        (lambda weights: weights.pop(NORM), rf"missing in the written weights: {NORM}"),
        (lambda weights: weights.update({"model.layers.4.extra": torch.ones(2)}), "unexpected in the written weights"),
        (lambda weights: weights.update({NORM: torch.ones(3)}), "the model can't be loaded"),
    ],
)
def test_wrong_weights(written: Written, change: Change, found: str) -> None:
    written.change_weights(change)
    written.fails(found)


def test_a_file_cut_short(written: Written) -> None:
    path = written.folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    written.fails("the model can't be loaded")


@pytest.mark.parametrize(
    ("file", "change", "found"),
    [
        ("config.json", lambda values: values.update(dtype="float16"), "config.json says dtype float16"),
        ("config.json", lambda values: values.update(rms_norm_eps=1e-2), "logits differ by up to .*: config.json"),
        (
            "config.json",
            lambda values: values["rope_parameters"].update(rope_theta=20.0),
            r"logits differ by up to .*: buffer model\.rotary_emb\.inv_freq",
        ),
        ("collapse_plan.json", lambda values: values.update(source="org/other"), "collapse_plan.json differs"),
        ("collapse_plan.json", lambda values: values.pop("merges"), "collapse.plan"),
        (
            "tokenizer.json",
            lambda values: values["model"]["vocab"].update(extra=320),
            "the tokenizer's vocabulary differs",
        ),
        ("tokenizer.json", lambda values: values["model"]["merges"].clear(), "the tokenizer encodes otherwise"),
    ],
)
def test_other_files(written: Written, file: str, change: Change, found: str) -> None:
    written.change_json(file, change)
    written.fails(found)


def test_a_lost_chat_template(written: Written) -> None:
    (written.folder / "chat_template.jinja").unlink()
    written.fails("the chat template differs")


def test_a_model_whose_rotary_frequencies_were_rounded(
    tmp_path: Path, collapsed: Callable[..., tuple], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    """``model.to(bfloat16)`` rounds them, and no folder can hold that."""
    model, plan = collapsed()
    Written(tmp_path / "x", model.to(torch.bfloat16), tiny_tokenizer, plan).fails(r"logits differ.*inv_freq")


def test_a_model_that_computes_nothing(written: Written) -> None:
    with torch.no_grad():
        written.duplicate.model.norm.weight.fill_(float("nan"))
    written.change_weights(lambda weights: weights["model.norm.weight"].fill_(float("nan")))
    written.fails("the model's logits are not finite")


def test_a_broken_cache(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers numbered alike share one entry of the cache: what surgery without renumbering leaves."""
    build = LlamaForCausalLM.__init__

    def misnumbered(self: LlamaForCausalLM, *args: object, **kwargs: object) -> None:
        build(self, *args, **kwargs)
        self.model.layers[3].self_attn.layer_idx = 2

    monkeypatch.setattr(LlamaForCausalLM, "__init__", misnumbered)
    written.fails("generation with a KV cache differs from that without at token")


@pytest.mark.parametrize(("gap", "allowed"), [(5e-4, True), (5e-3, False)])
def test_a_cached_token_that_the_model_in_memory_would_not_choose(
    tmp_path: Path,
    collapsed: Callable[..., tuple],
    tiny_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    gap: float,
    allowed: bool,
) -> None:
    """Two twin rows of the head: a pass prefers the one, and with a cache the other, by less than cached logits may."""
    model, plan = collapsed()
    prompts, _ = prompts_for(model, tiny_tokenizer)
    best = int(text_logits(model, prompts[0])[-1].argmax())
    twin = (best + 1) % len(tiny_tokenizer)
    with torch.no_grad():
        model.lm_head.weight *= 10
        model.lm_head.weight[twin] = model.lm_head.weight[best]
    written = Written(tmp_path / "x", model, tiny_tokenizer, plan)
    forward = LlamaForCausalLM.forward

    def unlike(self: LlamaForCausalLM, *args: Any, **kwargs: Any) -> Any:
        result = forward(self, *args, **kwargs)
        result.logits[..., twin if kwargs["use_cache"] else best] += gap
        return result

    monkeypatch.setattr(LlamaForCausalLM, "forward", unlike)
    if allowed:
        proof = written.prove()
        assert proof.flips > 0
        assert f"{proof.flips} flips between logits less than 0.001 apart" in proof.lines()[2]
    else:
        written.fails(
            rf"the reloaded model chose token {twin} as new token 0 of prompt 0, whose logit in the model in memory is "
            rf"0\.005 below that of token {best}"
        )


def test_cached_logits_that_are_none(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = LlamaForCausalLM.forward

    def spoilt(self: LlamaForCausalLM, *args: Any, **kwargs: Any) -> Any:
        result = forward(self, *args, **kwargs)
        if kwargs["use_cache"]:
            result.logits[...] = float("nan")
        return result

    monkeypatch.setattr(LlamaForCausalLM, "forward", spoilt)
    written.fails("generation with a KV cache differs from that without at token 0: logits by nan")


def test_the_cost_is_one_cached_decoding_and_two_passes_a_prompt(
    written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, lengths = LlamaForCausalLM.forward, []

    def counted(self: LlamaForCausalLM, *args: Any, **kwargs: Any) -> Any:
        lengths.append(kwargs["input_ids"].shape[1])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", counted)
    written.prove()
    assert len(lengths) == 5 * (64 + 2)
    assert lengths.count(1) == 5 * 63
