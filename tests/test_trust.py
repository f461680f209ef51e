"""Nothing that comes with a model or with data is run unless the user says so, and no pickle is opened."""

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from laco_train.collapse import CollapsePlan
from laco_train.errors import InputError
from laco_train.export.source import read_source
from laco_train.models import load_config, load_model, load_tokenizer
from laco_train.models.sources import package_file
from laco_train.settings import ModelSettings
from laco_train.training.module import CHECKPOINT_KEY
from laco_train.training.sources import HubSet
from tests.cli.runs import Project, shared_project
from tests.spoilt import Evil

__all__ = ["shared_project"]

Folder = Callable[..., Path]


def change(folder: Path, **values: Any) -> Path:
    """`folder` with some keys of its config.json changed."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def load_all(folder: Path) -> None:
    """Config, weights and tokenizer."""
    load_config(str(folder))
    load_model(str(folder), dtype=torch.float32)
    load_tokenizer(str(folder))


def refusal(folder: Path, key: str = "model.source") -> str:
    """The one line that loading `folder` ends in."""
    with pytest.raises(InputError) as error:
        load_all(folder)
    assert error.value.key == key
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_pickled_weights_are_not_opened(tiny_folder: Folder, tmp_path: Path, name: str) -> None:
    folder = tiny_folder()
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    assert "pickles (pytorch_model.bin) aren't read" in refusal(folder)
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_beside_safetensors_are_left_alone(tiny_folder: Folder, tmp_path: Path) -> None:
    folder = tiny_folder()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    load_all(folder)
    assert not (tmp_path / "ran").exists()


def test_index_of_safetensors_that_names_a_pickle(tiny_folder: Folder) -> None:
    folder = tiny_folder()
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")  # Transformers would load this one
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, "pytorch_model.bin")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.safetensors.index.json of" in (line := refusal(folder)) and "names pytorch_model.bin" in line


BROKEN = ["", "null", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"metadata": {}}', "[" * 5000]


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_broken_index(tiny_folder: Folder, text: str) -> None:
    folder = tiny_folder()
    (folder / "model.safetensors.index.json").write_text(text)
    assert "index.json" in refusal(folder)


@pytest.mark.parametrize("text", ["", "null", "[]", "3", "{", "[" * 5000, '{"model_type": 3}', '{"model_type": []}'])
def test_broken_config(tiny_folder: Folder, text: str) -> None:
    folder = tiny_folder()
    (folder / "config.json").write_text(text)
    refusal(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 0),
        ("num_hidden_layers", -1),
        ("num_hidden_layers", 10**30),
        ("hidden_size", -8),
        ("num_attention_heads", 0),
        ("head_dim", -1),
        ("vocab_size", 10**30),
        ("pad_token_id", 10**30),
        ("architectures", 3),
        ("dtype", []),
        ("hidden_act", "evil"),
    ],
)
def test_config_that_no_model_has(tiny_folder: Folder, key: str, value: Any) -> None:
    refusal(change(tiny_folder(), **{key: value}))


def evil_module(folder: Path) -> Path:
    """Where `ran` appears if the module evil.py in `folder` is imported."""
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(folder / 'ran')!r})\nclass Thing:\n    pass\n")
    return folder / "ran"


def test_code_beside_a_known_model_is_not_run(tiny_folder: Folder) -> None:
    folder = change(tiny_folder(), auto_map={"AutoConfig": "evil.Thing", "AutoModelForCausalLM": "evil.Thing"})
    ran = evil_module(folder)
    path = folder / "tokenizer_config.json"
    tokens = {**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": ["evil.Thing", "evil.Thing"]}}
    path.write_text(json.dumps(tokens))
    load_all(folder)  # by Transformers' own classes
    assert not ran.exists()


def test_code_of_an_unknown_model_is_refused(tiny_folder: Folder) -> None:
    folder = change(tiny_folder(), model_type="evil", auto_map={"AutoConfig": "evil.Thing"})
    ran = evil_module(folder)
    assert "needs Python code that comes with it" in refusal(folder, "model.trust_remote_code")
    assert not ran.exists()
    assert ModelSettings("x").trust_remote_code is False


def test_attention_kernel_of_the_hub_is_refused(tiny_folder: Folder) -> None:
    folder = change(tiny_folder(), attn_implementation="someone/kernel")
    assert "asks for the attention kernel someone/kernel" in refusal(folder, "model.trust_remote_code")


def test_adapter_beside_a_model_is_refused(tiny_folder: Folder, tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    folder = tiny_folder()
    adapted = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.peft_config["default"].base_model_name_or_path = str(folder)
    adapted.save_pretrained(folder)  # Transformers would put it on the model
    assert "holds a peft adapter, beside its model" in refusal(folder)


def test_chat_template_is_no_program(tiny_folder: Folder) -> None:
    folder = tiny_folder()
    target = folder / "ran"
    template = (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}" + f"{{{{ cycler.__init__.__globals__.os.mkdir('{target}') }}}}"
    )
    (folder / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(str(folder))
    with pytest.raises(Exception, match="unsafe"):
        tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert not target.exists()


def test_data_set_with_a_script_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "words"
    folder.mkdir()
    ran = folder / "ran"
    (folder / "words.py").write_text(f"import os\nos.mkdir({str(ran)!r})\n")
    with pytest.raises(InputError, match=r"^data\.train: .*words.* script") as error:
        list(HubSet("data.train", str(folder), None).rows("text"))
    assert "\n" not in str(error.value)
    assert not ran.exists()


def test_package_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "evil_weights"
    package.mkdir()
    (package / "__init__.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    (package / "a.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert package_file("package:evil_weights/a.gguf") == package / "a.gguf"
    assert not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def project(shared_project: Project) -> Project:
    """A project, its run of one step in lightning_logs."""
    source = str(shared_project.root / "model")
    shared_project.fit("--trainer.max_steps", "1", "--export.enabled", "false", "--model.source", source)
    return shared_project


def test_a_checkpoint_does_not_vouch_for_code(project: Project, tmp_path: Path) -> None:
    (whole,) = project.root.glob("lightning_logs/tiny/version_0/checkpoints/*.ckpt")
    values = torch.load(whole, weights_only=True)
    values[CHECKPOINT_KEY]["model"]["trust_remote_code"] = True
    path = tmp_path / "trusting.ckpt"
    torch.save(values, path)
    with pytest.raises(InputError, match=r"^--trust-remote-code: is needed: .*trusting\.ckpt"):
        read_source(path)
    assert read_source(path, trust_remote_code=True).plan is not None
    result = project("export", "--checkpoint", str(path), "--output", "new", "--trust-remote-code")
    assert result.code == 0, result.err


@pytest.fixture(scope="module")
def plan(project: Project) -> CollapsePlan:
    """That of the run."""
    (path,) = project.root.glob("lightning_logs/tiny/version_0/collapse_plan.json")
    return CollapsePlan.load(path)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"layers": 7}, "was made for 6 layers"),
        ({"hidden": 64}, "was made for another model"),
        ({"intermediate_size": 96}, "was made for another model"),
        ({"seed": 1}, "was made for another model"),
        ({"tie_word_embeddings": True}, "was made for another model"),
    ],
    ids=lambda value: str(value),
)
def test_plan_of_another_model_is_refused(
    project: Project, plan: CollapsePlan, tiny_folder: Folder, other: dict[str, Any], words: str
) -> None:
    """By depth, by shapes, by weights: at the command line."""
    plan.save(project.root / "plan.json")
    before = set(project.files())
    for verb in (["collapse", "--output", "new2"], ["fit"]):
        source = ["--model.source", str(tiny_folder(name="other", **other))]
        result = project(*verb, "--recipe", "tiny.yaml", "--collapse.plan", "plan.json", *source)
        assert result.code == 2
        assert result.err.splitlines()[-1].startswith(f"laco_train: error: collapse.plan: {words}")
    assert set(project.files()) == before


def test_plan_of_other_weights_type_is_refused(project: Project, plan: CollapsePlan) -> None:
    replace(plan, dtype="bfloat16").save(project.root / "half.json")
    result = project("collapse", "--output", "new3", "--recipe", "tiny.yaml", "--collapse.plan", "half.json")
    assert result.code == 2
    assert "was made for bfloat16 weights, these are float32" in result.err
