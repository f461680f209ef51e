"""Models whose code comes with their weights, in verbs without a recipe: an option says that it may run."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.cli.runs import KEEP_ALL, Project
from tests.collapse.tiny import STANDINS, tiny

IDS = torch.arange(4, 20).unsqueeze(0)
TRUST = "--trust-remote-code"
BENCH = ["bench-inference", "--batch-sizes", "1", "--prompt-tokens", "8", "--new-tokens", "2", "--turns", "1"]


pytestmark = pytest.mark.usefixtures("modules_folder")


@pytest.fixture(scope="module")
def families(shared_project: Project, tiny_tokenizer: PreTrainedTokenizerFast) -> Project:
    """The project, with a model of each such family in a folder of its name."""
    for kind in STANDINS:
        tiny(kind).save_pretrained(shared_project.root / kind)
        tiny_tokenizer.save_pretrained(shared_project.root / kind)
    return shared_project


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)
    found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("kind", STANDINS)
def test_a_run_and_its_export_are_exported(families: Project, kind: str) -> None:
    run = families.fit("--model.source", kind, "--model.trust_remote_code", "true", "--trainer.max_steps", "1")
    assert f"Warning: attention of {kind} does not heed where documents begin" in run.result.out
    for source in (run.folder, run.folder / "export"):
        output = families.root / f"{kind}-{source.name}"
        result = families("export", "--checkpoint", str(source), "--output", str(output), TRUST)
        assert result.code == 0, result.err
        assert torch.equal(logits(output), logits(run.folder / "export"))


def test_an_adapter_is_kept(families: Project) -> None:
    lora = ["--model.method", "lora", "--model.lora.rank", "2", *KEEP_ALL]
    run = families.fit("--model.source", "baichuan", "--model.trust_remote_code", "true", *lora)
    arguments = ["--checkpoint", str(run.folder), "--adapter", "keep", "--output", "kept"]
    result = families("export", *arguments, TRUST)
    assert result.code == 0, result.err
    base = AutoModelForCausalLM.from_pretrained(families.root / "kept", dtype=torch.float32, trust_remote_code=True)
    both = PeftModel.from_pretrained(base, str(families.root / "kept/adapter"))(IDS).logits
    torch.testing.assert_close(both, logits(run.folder / "export"), rtol=0, atol=1e-4)


def test_they_are_evaluated(families: Project) -> None:
    text = ["--perplexity", "validation.jsonl", "--block", "32", "--stride", "32"]
    result = families("evaluate", "--model", *STANDINS, *text, "--output", "evaluated", TRUST)
    assert result.code == 0, result.err
    values = json.loads((families.root / "evaluated/evaluation.json").read_text(encoding="utf-8"))
    assert [model["name"] for model in values["models"]] == [*STANDINS]
    assert all(model["perplexity"]["perplexity"] > 1 and model["samples"] for model in values["models"])


def test_they_are_timed(families: Project) -> None:
    result = families(*BENCH, *STANDINS, "--output", "timed.json", TRUST)
    assert result.code == 0, result.err
    values = json.loads((families.root / "timed.json").read_text(encoding="utf-8"))
    assert all("decode_tokens_per_second" in model["batches"][0] for model in values["models"])


@pytest.mark.parametrize(
    "arguments",
    [["export", "--checkpoint", "baichuan"], ["evaluate", "--model", "baichuan"], [*BENCH, "baichuan"]],
    ids=lambda arguments: arguments[0],
)
def test_without_the_users_word_they_are_refused_by_the_verbs_own_option(
    families: Project, arguments: list[str]
) -> None:
    result = families(*arguments, "--output", "refused")
    assert result.code == 2
    needs = "baichuan needs Python code that comes with it; read that code, then add this if you trust it"
    assert result.err.splitlines()[-1] == f"laco_train: error: {TRUST}: {needs}"
    assert not (families.root / "refused").exists()


def test_their_speeds_are_compared(families: Project) -> None:
    refused = "internlm2 was not measured: model.trust_remote_code"
    assert refused in families("compare", "internlm2", "--output", "untrusted").out
    assert "was not measured" not in families("compare", "internlm2", "--output", "trusted", TRUST).out
