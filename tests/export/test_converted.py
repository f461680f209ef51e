"""Other formats are loaded by their own runtime; what they hold is compared with Transformers."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from laco_train.errors import InputError, TrainingStopped
from laco_train.export import CardFacts, ctranslate2, gguf, onnx
from laco_train.export.converted import export_converted, require
from laco_train.export.gguf import Gguf, ReadBack, find_converter
from laco_train.export.runtime_proof import prove_equal
from laco_train.manifest import faults, read_manifest

Factory = Callable[..., tuple]
FORMATS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "ctranslate2": (ctranslate2.Ctranslate2, ctranslate2.PACKAGES),
    "onnx": (onnx.Onnx, onnx.PACKAGES),
}


def quiet(_: str) -> None:
    """Print nothing."""


def needs(name: str) -> Any:
    form, packages = FORMATS[name]
    for package in packages:
        pytest.importorskip(package)
    return form()


@pytest.mark.parametrize("name", FORMATS)
def test_export_is_proven_and_whole(
    tmp_path: Path, collapsed: Factory, tiny_tokenizer: PreTrainedTokenizerFast, facts: CardFacts, name: str
) -> None:
    form = needs(name)
    model, plan = collapsed(layers=4)
    said: list[str] = []
    arguments = {"plan": plan, "card": facts, "say": said.append}
    lines = export_converted(model, tiny_tokenizer, tmp_path / "x", name, form, **arguments)
    assert "320 greedy tokens of 5 prompts as in Transformers" in lines[0]
    assert float(lines[1].rpartition(" ")[2]) < 1e-4
    assert all(f"export: {line}" in said for line in lines)
    manifest = read_manifest(tmp_path / "x", "x")
    assert faults(tmp_path / "x", manifest) == {}
    assert manifest.export["format"] == name
    assert {"README.md", "collapse_plan.json", "tokenizer.json"} <= manifest.files.keys()
    assert not any(".transformers" in file or file.endswith(".safetensors") for file in manifest.files)
    assert AutoTokenizer.from_pretrained(tmp_path / "x").get_vocab() == tiny_tokenizer.get_vocab()
    card = (tmp_path / "x" / "README.md").read_text(encoding="utf-8")
    assert f"library_name: {name}" in card
    assert lines[0] in card
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    model.model.layers[1].mlp.down_proj.weight.data.mul_(-1)
    with pytest.raises(TrainingStopped, match=r"the proof failed, nothing was exported: \w+ chose token"):
        form.prove(model, tiny_tokenizer, tmp_path / "x")


class Unlike:
    """A format that writes something and then finds it wrong."""

    packaging, rounded_to = ctranslate2.Ctranslate2.packaging, torch.float32

    def write(self, source: Path, model: LlamaForCausalLM, folder: Path) -> None:
        """A file, from a folder that plain Transformers could load."""
        (folder / "model.bin").write_bytes((source / "model.safetensors").read_bytes())

    def prove(self, *_: Any) -> list[str]:
        """None."""
        raise TrainingStopped("export: the proof failed")


def test_a_failed_proof_leaves_nothing(
    tmp_path: Path, tiny_llama: Any, tiny_tokenizer: PreTrainedTokenizerFast, facts: CardFacts
) -> None:
    arguments = {"plan": None, "card": facts, "say": quiet}
    with pytest.raises(TrainingStopped, match="the proof failed"):
        export_converted(tiny_llama(layers=1), tiny_tokenizer, tmp_path / "x", "unlike", Unlike(), **arguments)
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_named() -> None:
    with pytest.raises(
        InputError, match=r"--format: onnx needs no_such_package; run `pip install 'laco-train\[onnx\]'`"
    ):
        require("onnx", ("pytest", "no_such_package"))


def test_a_converter_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gguf needs llama\.cpp's converter: `git clone"):
        find_converter(None)
    with pytest.raises(InputError, match=r"--llama-cpp: there is no convert_hf_to_gguf\.py in"):
        find_converter(str(tmp_path))
    inside = tmp_path / "vendor" / "llama.cpp"
    inside.mkdir(parents=True)
    (inside / "convert_hf_to_gguf.py").touch()
    assert find_converter(str(tmp_path)).parent == find_converter(str(inside)).parent == inside.resolve()


def test_a_converter_that_fails_is_one_line(
    tmp_path: Path, tiny_llama: Any, tiny_tokenizer: PreTrainedTokenizerFast, facts: CardFacts
) -> None:
    script = tmp_path / "convert_hf_to_gguf.py"
    script.write_text("raise NotImplementedError('BPE pre-tokenizer was not recognized')\n", encoding="utf-8")
    form = Gguf("f16", script, runtime=False)
    with pytest.raises(TrainingStopped, match=r"convert_hf_to_gguf\.py failed, nothing was exported: NotImpl.*BPE"):
        export_converted(
            tiny_llama(layers=1), tiny_tokenizer, tmp_path / "x", "gguf", form, plan=None, card=facts, say=quiet
        )
    assert [path.name for path in tmp_path.iterdir()] == [script.name]


def test_gguf_is_read_back(tmp_path: Path, tiny_llama: Any, smollm2: str, facts: CardFacts) -> None:
    """A tiny model with a tokenizer that llama.cpp knows; `make prove-gguf` does the same to a real model."""
    if "LLAMA_CPP" not in os.environ:
        pytest.skip("LLAMA_CPP names no folder of llama.cpp's repository")
    pytest.importorskip("sentencepiece")
    from laco_train.models import load_tokenizer

    tokenizer = load_tokenizer(smollm2)
    model = tiny_llama(layers=2, hidden=64, vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, pad_token_id=2)
    form = Gguf("f16", find_converter(os.environ["LLAMA_CPP"]), runtime=gguf.has_runtime())
    lines = export_converted(model, tokenizer, tmp_path / "x", "gguf", form, plan=None, card=facts, say=quiet)
    assert lines[0].startswith("read back by Transformers' GGUF loader: ")
    assert ("NOT PROVEN" in lines[-1]) is not gguf.has_runtime()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(-1)
    with pytest.raises(TrainingStopped, match="the proof failed"):
        prove_equal(model, ReadBack(tmp_path / "x" / form.file), tokenizer)
