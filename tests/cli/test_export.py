"""`export` from whatever holds a trained model, and the options that go not together."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from laco_train.export import cpu_copy, ctranslate2, gguf
from laco_train.manifest import MANIFEST, faults, read_manifest
from tests.cli.runs import KEEP_ALL, Project, Run
from tests.export.test_hub import Endpoint
from tests.study.studies import SHARED, study_of, write_recipe

IDS = torch.arange(1, 20).unsqueeze(0)


@pytest.fixture(scope="module")
def lora(shared_project: Project) -> Run:
    """A run that trained adapters."""
    return shared_project.fit("--model.method", "lora", "--model.lora.rank", "4", *KEEP_ALL)


def logits(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits


def export(project: Project, source: Path, name: str, *options: str) -> Path:
    result = project("export", "--checkpoint", str(source), "--output", name, *options)
    assert result.code == 0, result.err
    assert faults(project.root / name, read_manifest(project.root / name, "x")) == {}
    return project.root / name


def test_a_checkpoint_a_run_and_an_export_give_the_same(shared_project: Project, run: Run) -> None:
    first = export(shared_project, run.checkpoint(), "from_checkpoint")
    second = export(shared_project, run.folder, "from_run")
    third = export(shared_project, first, "from_export", "--dtype", "bfloat16")
    assert torch.equal(logits(first), logits(second))
    assert torch.equal(logits(first), logits(run.folder / "export"))
    assert AutoModelForCausalLM.from_pretrained(third).dtype == torch.bfloat16
    facts = [read_manifest(folder, "x").export["card"] for folder in (run.folder / "export", first, second, third)]
    assert facts[0]["steps"] == 6
    assert facts[1:] == [facts[0]] * 3


def test_an_arm_of_a_study(project: Project) -> None:
    """By the arm's folder or its run's, with an export of its own or without; of the study itself it takes none."""
    write_recipe(project, below=SHARED | {"study": {"arms": {"laco": {}, "scratch": {}}, "seeds": [0]}})
    arm = study_of(project).run("scratch-seed0").parent
    first = export(project, arm, "from_arm")
    assert torch.equal(logits(first), logits(arm / "version_0" / "export"))
    assert not torch.equal(logits(first), logits(arm.parent / "laco-seed0" / "version_0" / "export"))
    assert read_manifest(first, "x").export["card"]["steps"] == 6
    shutil.rmtree(arm / "version_0" / "export")
    for number, source in enumerate((arm, arm / "version_0")):
        assert torch.equal(logits(export(project, source, f"from_checkpoint_{number}")), logits(first))
    result = project("export", "--checkpoint", str(arm.parent), "--output", "none")
    assert result.code == 2
    assert "holds 2 runs; name one of them, such as " in result.err


def test_a_runs_last_checkpoint_is_that_of_the_most_steps(project: Project) -> None:
    run = project.fit("--export.enabled=false", *KEEP_ALL)
    os.utime(run.checkpoint(2))  # copied, or touched
    assert torch.equal(logits(export(project, run.folder, "last")), logits(export(project, run.checkpoint(6), "six")))


def test_a_model_that_was_never_here(shared_project: Project) -> None:
    folder = export(shared_project, shared_project.root / "model", "from_model")
    assert torch.equal(logits(folder), logits(shared_project.root / "model"))
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "without training since" in card
    assert "recipe" not in card
    assert not (folder / "collapse_plan.json").exists()


def test_an_adapter_merged_or_kept(shared_project: Project, lora: Run) -> None:
    merged = export(shared_project, lora.folder, "merged")
    kept = export(shared_project, lora.folder, "kept", "--adapter", "keep")
    assert "adapter: largest logit difference " in (kept / "README.md").read_text(encoding="utf-8")
    base = AutoModelForCausalLM.from_pretrained(kept, dtype=torch.float32)
    before = base(IDS).logits
    both = PeftModel.from_pretrained(base, str(kept / "adapter"))(IDS).logits
    assert (before - both).abs().max() > 1e-2
    torch.testing.assert_close(both, logits(merged), rtol=0, atol=1e-4)
    assert not list((kept / "adapter").glob("README.md"))  # peft's own names folders of this machine


def test_random_weights_are_told_by_the_run_and_by_its_export(shared_project: Project) -> None:
    run = shared_project.fit("--model.from_scratch", "true", "--trainer.max_steps", "2")
    again = export(shared_project, run.checkpoint(2), "random")
    for folder in (run.folder / "export", again):
        assert "all weights drawn at random" in (folder / "README.md").read_text(encoding="utf-8")


def test_files_are_as_open_as_the_umask_says(shared_project: Project, run: Run) -> None:
    before = os.umask(0o027)
    try:
        folder = export(shared_project, run.checkpoint(), "open")
    finally:
        os.umask(before)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in folder.iterdir()}
    assert "model.safetensors" in modes
    assert modes == dict.fromkeys(modes, "0o640")


def test_there_must_be_an_adapter_to_keep(shared_project: Project, run: Run) -> None:
    result = shared_project("export", "--checkpoint", str(run.folder), "--output", "none", "--adapter", "keep")
    assert result.code == 2
    assert "has no adapter to keep (its model.method is not lora)" in result.err


def test_another_format_from_a_run(shared_project: Project, run: Run) -> None:
    for package in ctranslate2.PACKAGES:
        pytest.importorskip(package)
    result = shared_project("export", "--checkpoint", str(run.folder), "--output", "ct2", "--format", "ctranslate2")
    assert result.code == 0, result.err
    assert "export: ctranslate2: largest logit difference" in result.out
    assert shared_project("verify", "ct2").code == 0


def test_a_dry_run_shows_the_card(shared_project: Project, run: Run) -> None:
    options = ["--push-to-hub", "me/tiny", "--dry-run"]
    result = shared_project("export", "--checkpoint", str(run.folder), "--output", "pushed", *options)
    assert result.code == 0, result.err
    assert "Dry run, nothing is sent. me/tiny would get" in result.out
    assert "bytes  model.safetensors" in result.out
    assert "  # A model collapsed from 6 to" in result.out


@pytest.mark.parametrize("shards", [[], ["--shard-size", "1KB"], ["--shard-size", "100KB"]])
def test_a_dry_run_may_be_uploaded(
    shared_project: Project,
    run: Run,
    hub: tuple[str, type[Endpoint]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    shards: list[str],
) -> None:
    folder = tmp_path / "tried"
    command = ["export", "--checkpoint", str(run.checkpoint()), "--output", str(folder), "--push-to-hub", "me/tiny"]
    command += shards
    first = shared_project(*command, "--dry-run")
    assert first.code == 0, first.err
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub[0])
    result = shared_project(*command)
    assert result.code == 0, result.err
    assert result.out.splitlines()[-2:] == [
        f"export: {folder} holds this export already, whole",
        f"Uploaded to {hub[0]}/me/tiny",
    ]
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert hub[1].files.keys() == before.keys()


@pytest.fixture
def tried(shared_project: Project, run: Run, tmp_path: Path) -> Path:
    """What `export` of the run would write."""
    return Path(shutil.copytree(run.folder / "export", tmp_path / "tried"))


def test_another_export_is_not_uploaded(shared_project: Project, run: Run, tried: Path) -> None:
    def refusal(*options: str, source: Path = run.folder) -> str:
        command = ["export", "--checkpoint", str(source), "--output", str(tried), *options]
        result = shared_project(*command)
        assert result.code == 2, result.out
        return result.err.splitlines()[-1].removeprefix(f"laco_train: error: --output: {tried} ")

    push, other = (
        ["--push-to-hub", "me/tiny", "--dry-run"],
        "holds another export than this; name another folder or empty it",
    )
    assert refusal().startswith("exists and is not empty")
    assert refusal(*push, source=run.checkpoint(4)) == other
    for option in (["--dtype", "bfloat16"], ["--shard-size", "1KB"]):
        assert refusal(*push, *option) == other
    (tried / "notes.txt").touch()
    assert refusal(*push).startswith("can't be uploaded: notes.txt is not of the export in it;")
    (tried / "config.json").write_text("{}")
    assert refusal(*push).startswith("can't be uploaded: config.json has 2 bytes, not ")
    (tried / MANIFEST).unlink()
    assert refusal(*push).startswith("exists and is not empty")


def test_the_home_folder(shared_project: Project, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the shell leaves ~ as it is, as in --output=~/new."""
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(run.folder / "export", tmp_path / "old")
    options = ["--checkpoint=~/old", "--output=~/new", "--push-to-hub", "you/name", "--dry-run"]
    result = shared_project("export", *options)
    assert result.code == 0, result.err
    assert "  # A model collapsed from 6 to" in result.out
    assert faults(tmp_path / "new", read_manifest(tmp_path / "new", "x")) == {}
    (tmp_path / gguf.CONVERTER).touch()
    assert gguf.find_converter("~") == (tmp_path / gguf.CONVERTER).resolve()
    evaluation = ["--evaluation", "tiny=~/none.json", "--output", "none"]
    result = shared_project("export", "--checkpoint", str(run.folder), *evaluation)
    assert f"--evaluation: {tmp_path}/none.json can't be read" in result.err


@pytest.mark.parametrize("card", [[], ["tiny.yaml"], None, "tiny.yaml", {"evaluations": 3}], ids=str)
def test_a_manifest_that_tells_no_card(shared_project: Project, run: Run, tmp_path: Path, card: Any) -> None:
    shutil.copytree(run.folder / "export", tmp_path / "damaged")
    manifest = tmp_path / "damaged" / MANIFEST
    values = json.loads(manifest.read_text(encoding="utf-8"))
    values["export"]["card"] = card
    manifest.write_text(json.dumps(values), encoding="utf-8")
    result = shared_project("export", "--checkpoint", str(manifest.parent), "--output", "none")
    assert result.code == 2
    assert f"--checkpoint: {manifest} is damaged" in result.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--format", "onnx", "--dtype", "bfloat16"], "--dtype: goes with --format hf only"),
        (["--format", "gguf", "--adapter", "keep"], "--adapter: goes with --format hf only"),
        (["--format", "onnx", "--shard-size", "1MB"], "--shard-size: goes with --format hf only"),
        (["--unproven"], "--unproven: goes with --format gguf only"),
        (["--gguf-type", "q8_0"], "--gguf-type: goes with --format gguf only"),
        (["--format", "onnx", "--llama-cpp", "/nowhere"], "--llama-cpp: goes with --format gguf only"),
        (["--dry-run"], "--dry-run: goes with --push-to-hub"),
        (["--push-to-hub", "a/b/c", "--dry-run"], "--push-to-hub: 'a/b/c' is no id"),
        (["--shard-size", "5 gigs"], "export.shard_size: must be a number with KB, MB or GB"),
        (["--format", "gguf", "--unproven"], "--llama-cpp: gguf needs llama.cpp's converter"),
        (["--checkpoint", "nowhere"], "--checkpoint: there is no 'nowhere'"),
        (["--checkpoint", "."], ".: is no run of fit, no study and no exported model"),
    ],
)
def test_what_goes_not_together(shared_project: Project, run: Run, options: list[str], words: str) -> None:
    if "gguf" in options and "--unproven" in options:
        pytest.importorskip("sentencepiece")
    before = shared_project.files()
    given = [] if "--checkpoint" in options else ["--checkpoint", str(run.folder)]
    result = shared_project("export", "--output", "none", *given, *options)
    assert result.code == 2
    assert words in result.err
    assert len(result.err.splitlines()) == 1
    assert shared_project.files() == before


def test_gguf_without_a_runtime_must_be_said_to_be_unproven(
    shared_project: Project, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("laco_train.export.gguf.has_runtime", lambda: False)
    result = shared_project("export", "--checkpoint", str(run.folder), "--output", "none", "--format", "gguf")
    assert result.code == 2
    assert "gguf can't be proven here: `pip install llama-cpp-python`" in result.err
    assert "--unproven" in result.err


def test_unproven_gguf_is_written_and_says_so(
    shared_project: Project, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama-cpp-python can't be imported; a script stands in for the converter, a model for what is read back."""
    pytest.importorskip("sentencepiece")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    script = """
import pathlib, sys
assert "library_name: transformers" in (pathlib.Path(sys.argv[1]) / "README.md").read_text()  # for its metadata
pathlib.Path(sys.argv[sys.argv.index("--outfile") + 1]).write_bytes(b"GGUF")
"""
    (tmp_path / gguf.CONVERTER).write_text(script, encoding="utf-8")

    def read_back(self: gguf.ReadBack, file: Path) -> None:
        assert file.read_bytes() == b"GGUF"
        exported = AutoModelForCausalLM.from_pretrained(run.folder / "export", dtype=torch.float32)
        self._model = cpu_copy(exported, torch.float16).float()

    monkeypatch.setattr(gguf.ReadBack, "__init__", read_back)
    options = ["--format", "gguf", "--llama-cpp", str(tmp_path), "--unproven"]
    result = shared_project("export", "--checkpoint", str(run.folder), "--output", "unproven", *options)
    assert result.code == 0, result.err
    unproven = "llama.cpp: NOT PROVEN in its own runtime, as llama-cpp-python is not installed"
    assert f"export: {unproven}\n" in result.out
    card = (shared_project.root / "unproven" / "README.md").read_text(encoding="utf-8")
    assert "library_name: gguf\n" in card
    proof = card.partition("## Proof\n")[2]
    assert "- read back by Transformers' GGUF loader: 320 greedy tokens of 5 prompts" in proof
    assert f"- {unproven}\n" in proof
    assert shared_project("verify", "unproven").code == 0


def test_a_damaged_source_is_found_by_verify(shared_project: Project, run: Run) -> None:
    shutil.copytree(run.folder / "export", shared_project.root / "copied")
    weights = shared_project.root / "copied" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    result = shared_project("verify", "copied")
    assert result.code == 2
    assert result.out == "model.safetensors: has other content than was exported (sha256)\n"
