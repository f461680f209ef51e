"""Weights drawn anew in the shape of a collapsed model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from laco_train.training.scratch import draw_weights
from tests.cli.runs import Project
from tests.cli.test_resume_auto import broken_off, resume

SCRATCH = ["--model.from_scratch", "true"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "export" / "model.safetensors")


def initial(folder: Path, seed: int) -> LlamaForCausalLM:
    """What Transformers makes of the config of an export."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: LlamaForCausalLM = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "export"))
    return model


def test_draw_is_that_of_the_config_and_seed(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    model, other = tiny_llama(3, tie_word_embeddings=True), tiny_llama(3, seed=7, tie_word_embeddings=True)
    for one in (model, other):
        one.to(torch.bfloat16)
        before = torch.random.get_rng_state()
        draw_weights(one, seed=5)
        assert torch.equal(torch.random.get_rng_state(), before)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        expected = LlamaForCausalLM(model.config).to(torch.bfloat16).state_dict()
    torch.testing.assert_close(model.state_dict(), expected, rtol=0, atol=0)
    draw_weights(other, seed=6)
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)


def test_run_begins_with_the_draw(project: Project) -> None:
    options = [*SCRATCH, "--trainer.max_steps=1", "--model.optimizer.learning_rate=1e-30"]
    options += ["--model.optimizer.weight_decay=0"]
    run = project.fit(*options, "--seed_everything=3")
    found, expected = weights(run.folder), initial(run.folder, 3).state_dict()
    assert [name for name, value in found.items() if not torch.equal(value, expected[name])] == []
    losses = run.summary()["losses"]
    assert losses["collapsed"] == pytest.approx(losses["trained"], rel=1e-6)
    assert run.summary()["depth"] == 4
    assert "All weights are drawn anew" in run.result.out
    collapsed = project.fit("--trainer.max_steps=1", "--export.enabled=false").summary()["losses"]
    assert collapsed["original"] == losses["original"]
    assert collapsed["collapsed"] != pytest.approx(losses["collapsed"], rel=1e-4)


def test_cut_off_run_goes_on_to_the_same_weights(project: Project) -> None:
    whole = project.fit(*SCRATCH)
    before = weights(whole.folder)
    whole.folder.rename(project.root / "whole")
    cut = broken_off(project, 3, *SCRATCH)
    result = resume(project, *SCRATCH)
    assert result.code == 0, result.err
    after = weights(cut)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    (checkpoint,) = cut.glob("checkpoints/*.ckpt")
    exported = project("export", "--checkpoint", str(checkpoint), "--output", "again")
    assert exported.code == 0, exported.err
    again = load_file(project.root / "again" / "model.safetensors")
    assert [name for name in before if not torch.equal(before[name], again[name])] == []


@pytest.mark.parametrize("method", ["lora", "last_layers"])
def test_other_methods_are_refused(shared_project: Project, method: str) -> None:
    before = shared_project.files()
    result = shared_project("fit", "--recipe", "tiny.yaml", *SCRATCH, "--model.method", method)
    line = f"laco_train: error: model.from_scratch: goes not with model.method {method}; use full\n"
    assert (result.code, result.err) == (2, line)
    assert shared_project.files() == before
