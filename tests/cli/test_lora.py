"""A LoRA fit: what the checkpoint holds, the adapter folder, the merged export."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from laco_train.collapse import CollapsePlan, apply_plan
from tests.cli.runs import Project, Run


@pytest.fixture(scope="module")
def lora(shared_project: Project) -> Run:
    """A LoRA fit on the attention's queries and values."""
    options = ["--model.method", "lora", "--model.lora.rank", "4", "--model.lora.targets", "[q_proj, v_proj]"]
    return shared_project.fit(*options)


def base(project: Project, run: Run) -> AutoModelForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(project.root / "model")
    return apply_plan(model, CollapsePlan.load(run.folder / "collapse_plan.json"))


def test_checkpoint_holds_the_adapters_alone(lora: Run) -> None:
    state = lora.state()
    names = sorted(state["state_dict"])
    assert len(names) == 4 * 2 * 2  # layers, targets, A and B
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    (optimizer,) = state["optimizer_states"]
    assert len(optimizer["state"]) == len(names)


def test_adapter_folder_loads_on_the_collapsed_base(lora: Run, shared_project: Project) -> None:
    folder = lora.folder / "adapter"
    assert {p.name for p in folder.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    adapted = PeftModel.from_pretrained(base(shared_project, lora), folder)
    exported = AutoModelForCausalLM.from_pretrained(lora.folder / "export")
    ids = torch.arange(20, 44).reshape(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, exported(ids).logits, rtol=1e-4, atol=1e-5)


def test_export_has_adapters_merged(lora: Run, shared_project: Project) -> None:
    before = base(shared_project, lora).state_dict()
    after = AutoModelForCausalLM.from_pretrained(lora.folder / "export").state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "v_proj"}
    assert len(changed) == 8


def test_one_name_is_a_target_too(project: Project) -> None:
    options = ["--model.method", "lora", "--model.lora.rank", "1", "--model.lora.targets", "o_proj"]
    run = project.fit(*options, "--trainer.max_steps", "2", "--export.enabled", "false")
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in run.state(2)["state_dict"]} == {"o_proj"}


def test_default_targets_are_every_linear_layer_but_the_head(project: Project) -> None:
    run = project.fit("--model.method", "lora", "--trainer.max_steps", "2", "--export.enabled", "false")
    names = {name.split(".lora_")[0].rpartition(".")[2] for name in run.state(2)["state_dict"]}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
