"""An export loads in plain Transformers, leaves the model alone, and appears whole or not at all."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from laco_train.collapse import CollapsePlan
from laco_train.errors import InputError, TrainingStopped
from laco_train.export import CardFacts, Proof, export_folder, refuse_nonempty, save_adapter
from laco_train.export.cpu_copy import adapted_copy
from laco_train.export.huggingface import write_folder
from laco_train.export.proof import adapted_texts, prove_adapter
from laco_train.export.runtime_proof import text_logits
from laco_train.manifest import MANIFEST, faults, read_manifest

IDS = torch.arange(1, 20).unsqueeze(0)
Factory = Callable[..., tuple]


def quiet(_: str) -> None:
    """Print nothing."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tied", [True, False])
def test_folder_reloads_as_the_model(
    tmp_path: Path,
    collapsed: Factory,
    tiny_tokenizer: PreTrainedTokenizerFast,
    facts: CardFacts,
    tied: bool,
    dtype: torch.dtype,
) -> None:
    model, plan = collapsed(tie_word_embeddings=tied)
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.25, eos_token_id=0)
    output = tmp_path / "deep" / "export"
    said: list[str] = []
    proof = export_folder(model, tiny_tokenizer, output, dtype=dtype, plan=plan, card=facts, say=said.append)

    stored = load_file(output / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {dtype}
    assert ("lm_head.weight" in stored) is not tied
    reloaded = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    assert reloaded.dtype == dtype
    assert reloaded.config.num_hidden_layers == 4
    assert (reloaded.lm_head.weight is reloaded.model.embed_tokens.weight) is tied
    for (name, ours), theirs in zip(model.named_parameters(), reloaded.parameters(), strict=True):
        assert torch.equal(ours.detach().to(dtype), theirs), name
    assert reloaded.generation_config.temperature == 0.25
    assert AutoTokenizer.from_pretrained(output).chat_template == tiny_tokenizer.chat_template
    assert CollapsePlan.load(output / "collapse_plan.json") == plan
    assert "from 6 to 4 decoder layers" in (output / "README.md").read_text(encoding="utf-8")

    assert (proof.tensors, proof.max_logit_difference, proof.prompts) == (len(model.state_dict()), 0.0, 5)
    assert proof.generated_tokens == 5 * 64
    later = (MANIFEST, "README.md")
    assert proof.bytes == sum(path.stat().st_size for path in output.iterdir() if path.name not in later)
    assert faults(output, read_manifest(output, "x")) == {}
    assert read_manifest(output, "x").export == {"format": "hf", "card": facts.to_dict()}
    assert all(f"export: {line}" in said for line in proof.lines())
    assert [path.name for path in output.parent.iterdir()] == ["export"]


def test_live_model_is_untouched(
    tmp_path: Path, adapted: Factory, tiny_tokenizer: PreTrainedTokenizerFast, facts: CardFacts
) -> None:
    model, plan = adapted()
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()

    def state(model: nn.Module) -> list[tuple]:
        return [
            (name, id(p), p.dtype, p.device, p.requires_grad, id(p.grad), p.detach().clone().numpy().tobytes())
            for name, p in model.named_parameters()
        ]

    modules = [(name, id(module), module.training) for name, module in model.named_modules()]
    before, config, vocabulary = state(model), model.base_model.model.config.to_dict(), tiny_tokenizer.get_vocab()
    export_folder(model, tiny_tokenizer, tmp_path / "x", dtype=torch.bfloat16, plan=plan, card=facts, say=quiet)
    assert state(model) == before
    assert [(name, id(module), module.training) for name, module in model.named_modules()] == modules
    assert model.base_model.model.config.to_dict() == config
    assert tiny_tokenizer.get_vocab() == vocabulary


def test_lora_is_merged_and_reloads(
    tmp_path: Path, adapted: Factory, tiny_tokenizer: PreTrainedTokenizerFast, facts: CardFacts
) -> None:
    model, plan = adapted(tie_word_embeddings=True)
    export_folder(model, tiny_tokenizer, tmp_path / "x", dtype=torch.float32, plan=plan, card=facts, say=quiet)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "x", dtype=torch.float32)
    torch.testing.assert_close(reloaded(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_adapter_is_kept_beside_its_base(
    tmp_path: Path, adapted: Factory, tiny_tokenizer: PreTrainedTokenizerFast, facts: CardFacts, dtype: torch.dtype
) -> None:
    model, plan = adapted()
    model.generation_config.temperature = 0.25
    said: list[str] = []
    arguments = {"plan": plan, "card": replace(facts, method="lora"), "say": said.append, "keep_adapter": True}
    export_folder(model, tiny_tokenizer, tmp_path / "x", dtype=dtype, **arguments)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "x", dtype=torch.float32)
    with model.disable_adapter():
        before = model(IDS).logits
    near = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(base(IDS).logits, before, rtol=0, atol=near)
    both = PeftModel.from_pretrained(base, str(tmp_path / "x" / "adapter"))
    assert (model(IDS).logits - before).abs().max() > 0.5
    torch.testing.assert_close(both(IDS).logits, model(IDS).logits, rtol=0, atol=near)
    assert "adapter/adapter_model.safetensors" in read_manifest(tmp_path / "x", "x").files
    config = json.loads((tmp_path / "x" / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == ".."
    assert GenerationConfig.from_pretrained(tmp_path / "x").temperature == 0.25
    written = (tmp_path / "x" / "README.md").read_text(encoding="utf-8")
    assert "adapter is not merged" in written
    assert "LoRA adapters were trained and kept apart" in written
    tokens, difference = (line.removeprefix("export: ") for line in said if line.startswith("export: adapter: "))
    assert tokens == "adapter: 320 greedy tokens of 5 prompts as of the model in memory (no flip)"
    assert difference.startswith("adapter: largest logit difference ")
    assert float(difference.rpartition(" ")[2]) < 1e-4
    assert f"compared with the model in memory.\n\n- {tokens}\n- {difference}\n" in written


def test_an_adapter_that_changed_on_the_disk_is_found(
    tmp_path: Path,
    adapted: Factory,
    tiny_tokenizer: PreTrainedTokenizerFast,
    facts: CardFacts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save = PeftModel.save_pretrained

    def save_and_damage(self: PeftModel, folder: str, **rest: object) -> None:
        save(self, folder, **rest)
        path = Path(folder) / "adapter_model.safetensors"
        weights = load_file(path)
        weights[next(name for name in weights if "layers.2" in name)][0, 0] += 0.5
        save_file(weights, path, metadata={"format": "pt"})

    monkeypatch.setattr(PeftModel, "save_pretrained", save_and_damage)
    model, plan = adapted()
    arguments = {"plan": plan, "card": facts, "say": quiet, "keep_adapter": True}
    with pytest.raises(TrainingStopped, match="logits of base and adapter differ by"):
        export_folder(model, tiny_tokenizer, tmp_path / "x", dtype=torch.float32, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_would_write_another_token_is_found(
    tmp_path: Path, adapted: Factory, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model, _ = adapted()
    expected = adapted_texts(adapted_copy(model, torch.float32), tiny_tokenizer)
    save_adapter(model, tmp_path / "adapter")
    model.unload().save_pretrained(tmp_path / "base")
    assert prove_adapter(tmp_path / "base", tmp_path / "adapter", expected).tokens == 5 * 64
    model, _ = adapted()
    ids = [*expected[1].ids[:-1], (expected[1].ids[-1] + 1) % len(tiny_tokenizer)]
    expected[1] = replace(expected[1], ids=ids, logits=text_logits(model.get_base_model(), ids).detach())
    with pytest.raises(TrainingStopped, match=rf"chose token {ids[-1]} as new token 63 of prompt 1, whose .* in base"):
        prove_adapter(tmp_path / "base", tmp_path / "adapter", expected)


def test_weights_are_split_by_the_size_of_a_shard(
    tmp_path: Path, collapsed: Factory, tiny_tokenizer: PreTrainedTokenizerFast, facts: CardFacts
) -> None:
    model, plan = collapsed()
    arguments = {"plan": plan, "card": facts, "say": quiet, "shard_size": "100KB"}
    export_folder(model, tiny_tokenizer, tmp_path / "x", dtype=torch.float32, **arguments)
    shards = list((tmp_path / "x").glob("model-*.safetensors"))
    assert len(shards) > 1
    assert all(path.stat().st_size < 110_000 for path in shards)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "x", dtype=torch.float32)
    assert torch.equal(reloaded(IDS).logits, model(IDS).logits)


def test_adapter_fits_the_collapsed_base(tmp_path: Path, adapted: Factory, collapsed: Factory) -> None:
    model, _ = adapted()
    save_adapter(model, tmp_path / "adapter")
    assert {"adapter_config.json", "adapter_model.safetensors", MANIFEST} <= {
        p.name for p in (tmp_path / "adapter").iterdir()
    }
    again = PeftModel.from_pretrained(collapsed()[0], str(tmp_path / "adapter"))
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_loads_without_laco_train(
    tmp_path: Path, collapsed: Factory, tiny_tokenizer: PreTrainedTokenizerFast, facts: CardFacts
) -> None:
    model, plan = collapsed()
    export_folder(model, tiny_tokenizer, tmp_path / "x", dtype=torch.float32, plan=plan, card=facts, say=quiet)
    program = """
import sys
class Refuse:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "laco_train":
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Refuse())
try:
    import laco_train
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("laco_train can be imported")
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
inputs = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], return_tensors="pt", return_dict=True)
print(model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)[0].tolist())
"""
    command = [sys.executable, "-I", "-c", program, str(tmp_path / "x")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ids = tiny_tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], return_tensors="pt", return_dict=True
    )
    expected = model.generate(**ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)[0].tolist()
    assert json.loads(done.stdout) == expected


def test_failed_proof_leaves_nothing(
    tmp_path: Path,
    collapsed: Factory,
    tiny_tokenizer: PreTrainedTokenizerFast,
    facts: CardFacts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def write_and_damage(duplicate: nn.Module, tokenizer: object, folder: Path, **rest: object) -> None:
        write_folder(duplicate, tokenizer, folder, **rest)
        weights = load_file(folder / "model.safetensors")
        weights["model.layers.2.mlp.up_proj.weight"][3, 5] += 0.001
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr("laco_train.export.huggingface.write_folder", write_and_damage)
    model, plan = collapsed()
    with pytest.raises(TrainingStopped, match=r"nothing was exported: model\.layers\.2\.mlp\.up_proj\.weight differs"):
        export_folder(model, tiny_tokenizer, tmp_path / "x", dtype=torch.float32, plan=plan, card=facts, say=quiet)
    assert list(tmp_path.iterdir()) == []


def test_failed_write_is_one_line_and_leaves_nothing(
    tmp_path: Path,
    collapsed: Factory,
    tiny_tokenizer: PreTrainedTokenizerFast,
    facts: CardFacts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def disk_full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    model, plan = collapsed()
    monkeypatch.setattr(CollapsePlan, "save", disk_full)
    with pytest.raises(TrainingStopped, match=r"can't write .*No space left on device"):
        export_folder(model, tiny_tokenizer, tmp_path / "x", dtype=torch.float32, plan=plan, card=facts, say=quiet)
    assert list(tmp_path.iterdir()) == []


def test_stale_partial_folders_do_not_block(
    tmp_path: Path,
    collapsed: Factory,
    tiny_tokenizer: PreTrainedTokenizerFast,
    facts: CardFacts,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.getpid", lambda: 4242)
    for pid in (4242, 4243):
        (tmp_path / f"x.partial-{pid}").mkdir()
        (tmp_path / f"x.partial-{pid}" / "junk.txt").write_text("cut short")
    (tmp_path / "x").mkdir()  # empty, so it may be taken
    model, plan = collapsed()
    proof = export_folder(model, tiny_tokenizer, tmp_path / "x", dtype=torch.float32, plan=plan, card=facts, say=quiet)
    assert isinstance(proof, Proof)
    assert not (tmp_path / "x" / "junk.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "x.partial-4243"]


def test_without_a_plan(
    tmp_path: Path, collapsed: Factory, tiny_tokenizer: PreTrainedTokenizerFast, facts: CardFacts
) -> None:
    model, _ = collapsed()
    export_folder(model, tiny_tokenizer, tmp_path / "x", dtype=torch.float32, plan=None, card=facts, say=quiet)
    assert not (tmp_path / "x" / "collapse_plan.json").exists()


def test_licence_of_the_base_model_is_inherited(
    tmp_path: Path, collapsed: Factory, tiny_tokenizer: PreTrainedTokenizerFast, facts: CardFacts
) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text("---\nlicense: gemma\n---\n", encoding="utf-8")
    model, plan = collapsed()
    card = replace(facts, base_model=str(tmp_path / "base"), licence=None)
    export_folder(model, tiny_tokenizer, tmp_path / "x", dtype=torch.float32, plan=plan, card=card, say=quiet)
    written = (tmp_path / "x" / "README.md").read_text(encoding="utf-8")
    assert "license: gemma\n" in written
    assert "The Gemma terms ask you" in written
    again = CardFacts.from_dict(read_manifest(tmp_path / "x", "x").export["card"])
    assert again.licence is not None and again.licence.id == "gemma"


def test_generation_config_that_transformers_refuses_to_save(
    tmp_path: Path, collapsed: Factory, tiny_tokenizer: PreTrainedTokenizerFast, facts: CardFacts
) -> None:
    model, plan = collapsed()
    model.generation_config = GenerationConfig(temperature=0.9, top_p=0.6)  # as the first Llama 2 had it
    export_folder(model, tiny_tokenizer, tmp_path / "x", dtype=torch.float32, plan=plan, card=facts, say=quiet)
    written = GenerationConfig.from_pretrained(tmp_path / "x")
    assert (written.temperature, written.top_p) == (0.9, 0.6)
    assert not model.generation_config.do_sample


@pytest.mark.parametrize("kind", ["file inside", "file", "file above"])
def test_what_exists_is_refused_before_any_work(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, facts: CardFacts, kind: str
) -> None:
    output = tmp_path / "x"
    if kind == "file inside":
        output.mkdir()
        (output / "mine.txt").write_text("mine")
    else:
        output.write_text("mine")
    target = output / "export" if kind == "file above" else output
    with pytest.raises(InputError, match=r"^export\.output: "):
        refuse_nonempty(target, "export.output")
    with pytest.raises(InputError, match=r"^--output: "):
        # an nn.Module that is no model: work on it would fail in another way
        export_folder(
            nn.Linear(1, 1), tiny_tokenizer, target, dtype=torch.float32, plan=None, card=facts, say=pytest.fail
        )
    assert "mine" in {path.read_text() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_mount_point_is_refused() -> None:
    with pytest.raises(InputError, match="mount point"):
        refuse_nonempty(Path("/proc"), "--output")
