"""What a model can't do is told before its weights are read, and so before validation and search take their minutes."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from laco_train.cli.early_checks import check_start
from laco_train.models import load_config
from laco_train.settings import CollapseSettings, LoraSettings, ModelSettings
from laco_train.training.adapters import attach_lora
from tests.cli.runs import CALIBRATION, Project
from tests.cli.test_bad_input import refused
from tests.collapse.tiny import tiny

# texts are opened after what is checked here, so that a line on another key came first
FIT = ["fit", "--recipe", "tiny.yaml", "--data.train", "missing.jsonl"]
DEPTH, RATIO = "--collapse.target_depth", "--collapse.target_ratio"
DISTILL = ["--model.distill.logits", "0.5", "--model.distill.teacher"]
HIDDEN = ["--model.distill.hidden", "1", "--model.distill.teacher"]
LAST = ["--model.method", "last_layers", "--model.last_layers"]
FREE = ["--collapse.similarity_threshold", "null"]
TARGETS = ["--model.method", "lora", "--model.lora.targets"]
MODELS = ("gemma2", "smollm3", "mixtral", "gpt_oss")
CASES = {
    "a teacher that is not there": ([*DISTILL, "nowhere"], "model.distill.teacher", "no folder 'nowhere' here"),
    "a teacher's own key": ([*DISTILL, "nowhere"], "model.distill.teacher", "set model.distill.teacher to DIR"),
    "a teacher without weights": ([*DISTILL, "weightless"], "model.distill.teacher", "no weights"),
    "a teacher of other words": ([*DISTILL, "words"], "model.distill.teacher", "a vocabulary of 321"),
    "a teacher of another depth": ([*HIDDEN, "deep"], "model.distill.teacher", "a depth of 7"),
    "targets that match nothing": ([*TARGETS, "[q_proj, query]"], "model.lora.targets", "query matches no module"),
    "more last layers than layers": ([*LAST, "7"], "model.last_layers", "is 7, but 6 layers at most will be left"),
    "more than a target leaves": ([*LAST, "5", *FREE, DEPTH, "4"], "model.last_layers", "but 4 layers at most"),
    "more than are not removed": ([*LAST, "5", "--collapse.remove", "[1, 4]"], "model.last_layers", "4 layers at most"),
    "a plan that is no JSON": ([*FREE, "--collapse.plan", "bad.json"], "collapse.plan", "bad.json is no JSON"),
    "JSON that is no plan": ([*FREE, "--collapse.plan", "list.json"], "collapse.plan", "no JSON object"),
    "a plan in another type": (
        [*FREE, "--collapse.plan", "collapsed/collapse_plan.json", "--trainer.precision", "bf16-true"],
        "collapse.plan",
        "made for float32 weights, these are bfloat16",
    ),
    "a plan of another depth": (
        [*FREE, "--collapse.plan", "collapsed/collapse_plan.json", "--model.source", "deep"],
        "collapse.plan",
        "made for 6 layers (model), this model has 7",
    ),
    "a ratio of all layers": ([*FREE, RATIO, "0.9"], "collapse.target_ratio", "is 7 layers of 6"),
    "a ratio out of reach": ([*FREE, RATIO, "0.6"], "collapse.target_ratio", "is 0.6, or 1 layers, but laco leaves 4"),
    "a depth out of reach": ([*FREE, DEPTH, "3"], "collapse.target_depth", "is 3, but laco leaves 4 layers at least"),
    "windows that all mix types": (["--model.source", "gemma2"], "collapse.mixed_types", "set collapse.mixed_types to"),
    "types beside the depth": (
        ["--model.source", "smollm3", *FREE, DEPTH, "3"],
        "collapse.target_depth",
        "; 2 windows are skipped, as their layers mix layer types: set collapse.mixed_types to first",
    ),
    "experts": (["--model.source", "mixtral"], "collapse.merge_rule", "can't join experts"),
}


@pytest.fixture(scope="module")
def models(
    shared_project: Project, tiny_llama: Callable[..., LlamaForCausalLM], tiny_tokenizer: PreTrainedTokenizerFast
) -> Project:
    """The project with models of other kinds, teachers that are none, and plans that are none."""
    root = shared_project.root
    made = {"deep": tiny_llama(layers=7), "words": tiny_llama(vocab_size=321)} | {kind: tiny(kind) for kind in MODELS}
    for name, model in made.items():
        model.save_pretrained(root / name)
        tiny_tokenizer.save_pretrained(root / name)
    shutil.copytree(root / "model", root / "weightless", ignore=shutil.ignore_patterns("*.safetensors"))
    (root / "bad.json").write_text("{")
    (root / "list.json").write_text("[1]")
    assert shared_project("collapse", "--recipe", "tiny.yaml", "--output", "collapsed").code == 0
    return shared_project


@pytest.mark.parametrize(("options", "key", "words"), CASES.values(), ids=CASES)
def test_told_before_anything_is_read(models: Project, options: list[str], key: str, words: str) -> None:
    named, problem = refused(models, *FIT, *options)
    assert named == key, problem
    assert words in problem


@pytest.mark.parametrize(
    "options",
    [
        [*DISTILL, "deep"],  # depths matter to hidden states alone
        [*LAST, "4", *FREE, DEPTH, "4"],
        [*FREE, "--collapse.plan", "collapsed/collapse_plan.json"],
        ["--model.source", "gemma2", "--collapse.mixed_types", "first"],
        ["--model.source", "mixtral", "--collapse.merge_rule", "drop", "--model.method", "lora"],
    ],
    ids=" ".join,
)
def test_what_can_be_done_gets_as_far_as_the_texts(models: Project, options: list[str]) -> None:
    key, problem = refused(models, *FIT, *options)
    assert key == "data.train", problem


def test_a_sweep_that_can_accept_nothing_measures_nothing(models: Project) -> None:
    sweep = ["analyze", "--recipe", "tiny.yaml", "--output", "new", "--model.source", "gemma2", "--sweep", "true"]
    result = models(*sweep)
    assert result.code == 2
    assert "error: collapse.mixed_types: every window of 2 or 3 or 4 layers mixes layer types" in result.err
    assert "Hidden states" not in result.err


def said(project: Project, source: str, **values: object) -> list[str]:
    """What the checks of a LoRA fit print."""
    place = str(project.root / source)
    model = ModelSettings(place, method="lora", lora=LoraSettings(**values))  # type: ignore[arg-type]
    collapse = CollapseSettings(merge_rule="drop", layers_per_merge=2, calibration=CALIBRATION)
    lines: list[str] = []
    check_start(model, collapse, load_config(place), torch.float32, trains=True, say=lines.append)
    return lines


def test_lora_says_what_it_leaves_alone(models: Project) -> None:
    (line,) = said(models, "gpt_oss")
    assert line.startswith("LoRA adapts no weights of experts, router: 89% of those in the layers' matrices")
    assert said(models, "gpt_oss", targets=["q_proj"]) == []  # which the user chose
    assert said(models, "mixtral") == said(models, "model") == []


def test_the_checks_move_no_random_number_and_warn_of_nothing(models: Project) -> None:
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said(models, "mixtral")
    assert torch.equal(torch.get_rng_state(), before)


def test_adapters_come_without_the_warning_of_peft(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        attach_lora(tiny_llama(), LoraSettings(rank=1))
    assert [str(one.message) for one in told] == []


def test_a_trusted_kernel_is_not_asked_for_so_early(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "attn_implementation": "someone/kernel"}))
    model = ModelSettings(str(tmp_path), trust_remote_code=True)
    loaded = load_config(model.source, trust_remote_code=True)
    check_start(model, CollapseSettings(), loaded, torch.float32, trains=True)
