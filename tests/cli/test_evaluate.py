"""`evaluate` on real folders of tiny models, from its command line to its folder."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import PreTrainedTokenizerFast

from tests.cli.runs import Project
from tests.collapse.tiny import tiny
from tests.evaluation.conftest import mini_suite

__all__ = ["mini_suite"]


@pytest.fixture(scope="module")
def collapsed(shared_project: Project) -> str:
    """A model of fewer layers, made by the program."""
    result = shared_project("collapse", "--recipe", "tiny.yaml", "--output", "collapsed")
    assert result.code == 0, result.err
    return "collapsed"


def numbers(project: Project, output: str) -> dict[str, dict]:
    """Models by name."""
    values = json.loads((project.root / output / "evaluation.json").read_text(encoding="utf-8"))
    return {model["name"]: model for model in values["models"]}


def test_perplexity_and_samples_need_no_harness(shared_project: Project, collapsed: str) -> None:
    (shared_project.root / "prompts.txt").write_text("The river\nA tokenizer\n")
    arguments = ["--perplexity", "validation.jsonl", "--block", "32", "--stride", "16", "--prompts", "prompts.txt"]
    result = shared_project("evaluate", "--model", collapsed, "--baseline", "model", *arguments, "--output", "text")
    assert result.code == 0, result.err
    found = numbers(shared_project, "text")
    assert list(found) == ["model", "collapsed"]
    assert found["collapsed"]["layers"] < found["model"]["layers"]
    for model in found.values():
        assert model["perplexity"]["perplexity"] > 1
        assert model["perplexity"]["protocol"]["block_length"] == 32
        assert len(model["samples"]) == 2
    hashes = {model["perplexity"]["protocol"]["tokens"] for model in found.values()}
    assert len(hashes) == 1
    page = (shared_project.root / "text/report.md").read_text(encoding="utf-8")
    assert "### The river" in page and "bits per byte" in page
    assert "bits per byte" in result.out and str(Path("text/report.md")) in result.out


def test_an_empty_baseline_is_none(shared_project: Project, collapsed: str) -> None:
    text = ["--perplexity", "validation.jsonl", "--block", "32", "--stride", "32", "--samples", "false"]
    result = shared_project("evaluate", "--model", collapsed, "--baseline", "", *text, "--output", "alone")
    assert result.code == 0, result.err
    assert json.loads((shared_project.root / "alone/evaluation.json").read_text())["baseline"] is None


def test_tasks_beside_the_baseline(shared_project: Project, collapsed: str, mini_suite: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra evaluation")
    suite = ["--suite", str(mini_suite), "--tasks", "piqa,boolq", "--samples", "false", "--batch-size", "4"]
    arguments = ["--model", f"laco={collapsed}", "again=model", "--baseline", "model", *suite]
    result = shared_project("evaluate", *arguments, "--limit", "4", "--output", "tasks")
    assert result.code == 0, result.err
    found = numbers(shared_project, "tasks")
    assert list(found) == ["model", "laco", "again"]
    assert found["model"]["tasks"]["piqa"]["questions"] == 4
    again = found["again"]["tasks"]["piqa"]
    assert (again["difference"], again["paired"], again["within_noise"]) == (0, True, True)
    assert found["laco"]["tasks"]["boolq"]["group"] == "knowledge"
    assert "suite" in found["laco"]["tasks"]["boolq"]["data"]
    assert "reasoning, mean of 1" in result.out
    assert list((shared_project.root / "tasks/tensorboard").iterdir())


def test_the_model_card_tells_it(shared_project: Project, collapsed: str) -> None:
    """Without the harness: a perplexity; and the card of a run says at once what its tasks gave."""
    text = ["--perplexity", "validation.jsonl", "--block", "32", "--samples", "false", "--stride", "16"]
    models = ["--model", f"laco={collapsed}", "--baseline", "original=model"]
    assert shared_project("evaluate", *models, *text, "--output", "told").code == 0
    export = ["export", "--checkpoint", collapsed, "--evaluation", "told/evaluation.json"]
    result = shared_project(*export, "--output", "with_card")
    assert result.code == 0, result.err
    card = ModelCard.load(shared_project.root / "with_card/README.md")
    perplexity, bits = card.data.eval_results or []
    measured = numbers(shared_project, "told")["laco"]["perplexity"]
    assert (perplexity.metric_type, perplexity.metric_value) == ("perplexity", measured["perplexity"])
    assert (bits.metric_type, bits.metric_value) == ("bits_per_byte", measured["bits_per_byte"])
    assert "| original | laco | measured on |" in card.text
    # what is exported again keeps it, and another model's evaluation is refused
    again = shared_project("export", "--checkpoint", "with_card", "--output", "again")
    assert again.code == 0 and ModelCard.load(shared_project.root / "again/README.md").data.eval_results
    other = shared_project("export", "--checkpoint", "model", *export[3:], "--output", "other")
    assert other.code == 2 and "--evaluation: laco in told/evaluation.json has 4 layers" in other.err


def test_bad_input_writes_nothing(shared_project: Project, collapsed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    before = shared_project.files()
    for arguments, problem in (
        ([], "--model: is missing"),
        (["--model", "model", "--samples", "false"], "--tasks: is empty"),
        (["--model", "model", "--tasks", "piqa"], "--tasks: needs lm-evaluation-harness"),
        (["--model", "model", "--tasks", "piqa,piqa"], "--tasks: names piqa twice"),
        (["--model", "model", "--limit", "0"], "--limit: must be 1 or more, is 0"),
        (["--model", "model", "--batch-size", "0"], "--batch-size: must be 1 or more"),
        (["--model", "model", "--baseline", "model"], "--model: two models are called model; name them"),
        (["--model", "tiny.yaml"], "tiny.yaml is a file but not a .gguf file"),
        (["--model", "model", "--device", "abacus"], "--device: abacus can't be used"),
        (["--model", "model", "--stride", "2000"], "--stride: must be 1 to 1024"),
        (["--model", "model", "--perplexity", "validation.jsonl"], "--block: is 1024, more than the model's 256"),
        (["--model", "model", "--perplexity", "none.txt"], "--perplexity: no file matches 'none.txt'"),
        (["--model", "model", "--prompts", "none.txt"], "--prompts: none.txt can't be read"),
        (["--model", "model", "--output", "model"], "--output: model exists and is not empty"),
    ):
        result = shared_project("evaluate", *arguments)
        assert result.code == 2, arguments
        assert problem in result.err, result.err
        assert result.err.count("\n") == 1
    assert shared_project.files() == before


def test_a_prompt_too_long_costs_no_measured_model(
    shared_project: Project, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tiny("gpt2").save_pretrained(shared_project.root / "gpt2")
    tiny_tokenizer.save_pretrained(shared_project.root / "gpt2")
    (shared_project.root / "long.txt").write_text("Short.\n" + "a river " * 300)
    result = shared_project("evaluate", "--model", "gpt2", "--prompts", "long.txt", "--output", "long")
    assert result.code == 2
    assert result.err.startswith("laco_train: error: --prompts: prompt 2 is ") and result.err.count("\n") == 1
    assert result.out == ""
    without = ["--perplexity", "validation.jsonl", "--block", "32", "--stride", "32", "--samples", "false"]
    result = shared_project("evaluate", "--model", "gpt2", "--prompts", "long.txt", "--output", "long", *without)
    assert result.code == 0, result.err


def test_the_home_folder(shared_project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "prompts.txt").write_text("The river\n")
    result = shared_project("evaluate", "--model", "model", "--prompts=~/prompts.txt", "--output=~/ev")
    assert result.code == 0, result.err
    assert (tmp_path / "ev/evaluation.json").is_file()
    assert not (shared_project.root / "~").exists()


def test_help_imports_no_torch() -> None:
    code = (
        "import sys\nfrom laco_train.cli import main\n"
        "try:\n    main(['evaluate', '--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'lightning', 'datasets', 'lm_eval'} & set(sys.modules), 'heavy import'"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "--baseline" in found.stdout
