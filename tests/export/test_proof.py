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
from laco_train.export import CardFacts, Proof, cpu_copy, prove
from laco_train.export.huggingface import write_folder
from laco_train.export.proof import prompt_ids

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
        facts: CardFacts,
    ):
        self.folder, self.tokenizer, self.plan = folder, tokenizer, plan
        self.duplicate = cpu_copy(model, torch.bfloat16)
        write_folder(self.duplicate, tokenizer, folder, plan=plan, card=facts)

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
def written(
    tmp_path: Path, collapsed: Callable[..., tuple], tiny_tokenizer: PreTrainedTokenizerFast, facts: CardFacts
) -> Written:
    model, plan = collapsed()
    return Written(tmp_path / "x", model, tiny_tokenizer, plan, facts)


def test_an_untouched_folder_is_proven(written: Written) -> None:
    assert written.prove().tensors == len(written.duplicate.state_dict())


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
    tmp_path: Path, collapsed: Callable[..., tuple], tiny_tokenizer: PreTrainedTokenizerFast, facts: CardFacts
) -> None:
    """``model.to(bfloat16)`` rounds them, and no folder can hold that."""
    model, plan = collapsed()
    Written(tmp_path / "x", model.to(torch.bfloat16), tiny_tokenizer, plan, facts).fails(r"logits differ.*inv_freq")


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


def test_prompts_leave_room_for_generation(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert [ids.shape[1] for ids in prompt_ids(tiny_tokenizer, None)] == [1, 7, 24, 64]
    assert [ids.shape[1] for ids in prompt_ids(tiny_tokenizer, 32)] == [1, 7, 16]
