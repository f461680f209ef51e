"""The real SmolLM2-135M: from the shipped CPU recipe to a trained model that plain Transformers runs."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from laco_train.collapse import CollapsePlan
from tests.cli.runs import Project, Run, events, scalars

RECIPE = "smollm2_135m_collapse_cpu"
DEPTH, LOWEST = 30, 24  # layers count from 1: C = 2 tries l = 28 down to 24
OPTIONS = {
    "collapse.lowest_layer": str(LOWEST),
    "collapse.calibration": json.dumps(["The river rises in the northern hills.", "Paris is the capital of France."]),
    "data.block_size": "64",
    "data.max_tokens": "2048",
    "data.validation_max_tokens": "512",
    "trainer.accelerator": "cpu",
    "trainer.max_steps": "2",
    "trainer.val_check_interval": "2",
    "trainer.log_every_n_steps": "1",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, smollm2: str) -> Run:
    """A fit of two steps."""
    project = Project(tmp_path_factory.mktemp("real"))
    options = [f"--{key}={value}" for key, value in OPTIONS.items()]
    result = project("fit", "--recipe", RECIPE, f"--model.source={smollm2}", *options)
    assert result.code == 0, result.err
    return Run(project.root / "lightning_logs" / RECIPE / "version_0", result)


@pytest.fixture(scope="module")
def plan(run: Run) -> CollapsePlan:
    """What the run decided."""
    return CollapsePlan.load(run.folder / "export" / "collapse_plan.json")


def test_plan_says_what_was_tried_and_done(plan: CollapsePlan, smollm2: str) -> None:
    assert (plan.source, plan.source_depth, plan.merge_rule) == (smollm2, DEPTH, "rdsc")
    assert plan.merges
    assert plan.depth == DEPTH - sum(merge.absorbed for merge in plan.merges)
    assert plan.candidates[0].layer == DEPTH - 2 - 1  # l = H - C, from 0
    assert min(candidate.layer for candidate in plan.candidates) == LOWEST - 1
    accepted = [(c.layer, c.absorbed, c.similarity) for c in plan.candidates if c.similarity and c.similarity > 0.60]
    assert accepted == [(merge.layer, merge.absorbed, merge.similarity) for merge in plan.merges]
    assert sorted(index for layer in plan.lineage for index in layer) == list(range(DEPTH))
    assert plan.calibration is not None
    assert plan.calibration.samples == 2


def test_parameters_are_those_of_the_layers_that_went(plan: CollapsePlan) -> None:
    assert plan.parameters.before == 134_515_008
    layer = 576 * (2 * 576 + 2 * 192) + 3 * 576 * 1536 + 2 * 576
    assert plan.parameters.after == 134_515_008 - (DEPTH - plan.depth) * layer


def test_curves_show_cost_and_recovery(run: Run) -> None:
    seen = events(run.folder)
    (_, original), *_ = scalars(seen, "val/loss_original")
    (start, collapsed), (end, trained) = scalars(seen, "val/loss")
    assert (start, end) == (0, 2)
    assert 2 < original < 5  # a model that knows English
    assert original < collapsed
    assert trained < collapsed
    assert [step for step, _ in scalars(seen, "train/loss")] == [0, 1]


def test_export_runs_in_plain_transformers(run: Run, plan: CollapsePlan) -> None:
    folder: Path = run.folder / "export"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert model.config.num_hidden_layers == len(model.model.layers) == plan.depth
    assert sum(p.numel() for p in model.parameters()) == plan.parameters.after
    inputs = tokenizer("It is a truth universally acknowledged, that", return_tensors="pt")
    generated = [
        model.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=cached) for cached in (True, False)
    ]
    assert generated[0].shape[1] > inputs.input_ids.shape[1]
    assert torch.equal(*generated)


def test_export_holds_everything(run: Run) -> None:
    names = {p.name for p in (run.folder / "export").iterdir()}
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "collapse_plan.json"}
    assert names >= {*wanted, "README.md"}
    assert "equal with and without a KV cache" in run.result.out
