"""Reading a training checkpoint without running code from it."""

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from laco_train.errors import InputError
from laco_train.training.checkpoint import read_checkpoint, restore
from tests.cli.runs import Run, make_project


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Run:
    """A run of two steps whose recipe names the model by its whole path."""
    project = make_project(tmp_path_factory.mktemp("project"), tiny_llama(), tiny_tokenizer)
    source = str(project.root / "model")
    return project.fit("--model.source", source, "--trainer.max_steps", "2", "--export.enabled", "false")


def test_what_a_checkpoint_says(run: Run) -> None:
    checkpoint = read_checkpoint(run.checkpoint(2))
    summary = run.summary()
    assert (checkpoint.plan.source_depth, checkpoint.plan.depth) == (6, 4)
    assert checkpoint.losses == summary["losses"]
    assert (checkpoint.steps, checkpoint.tokens) == (2, 128)
    assert (checkpoint.recipe, checkpoint.dtype) == ("tiny", torch.float32)
    assert checkpoint.model.optimizer.learning_rate == 0.01
    assert checkpoint.data["train"]["documents"] == 40


def test_restored_model_is_the_trained_one(run: Run) -> None:
    checkpoint = read_checkpoint(run.checkpoint(2))
    model, tokenizer = restore(checkpoint)
    weights = model.state_dict()
    assert {f"model.{name}" for name in weights} == set(checkpoint.state_dict)
    assert [n for n, w in weights.items() if not torch.equal(w, checkpoint.state_dict[f"model.{n}"])] == []
    assert not model.training
    assert tokenizer.decode(tokenizer("The river").input_ids) == "The river"


class Code:
    """Pickled, it writes a file when loaded by code that trusts it."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_code_in_a_checkpoint_does_not_run(tmp_path: Path, kind: str) -> None:
    path, target = tmp_path / "evil.ckpt", tmp_path / "ran"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Code(target)))
    else:
        torch.save({"laco_train": Code(target)}, path)
    with pytest.raises(InputError, match=r"^--ckpt_path: .*evil\.ckpt"):
        read_checkpoint(path, "--ckpt_path")
    assert not target.exists()
    torch.load(path, weights_only=False) if kind == "torch" else pickle.loads(path.read_bytes())
    assert target.exists()  # and it would have


@pytest.mark.parametrize("share", [0, 0.5, 0.999])
def test_cut_checkpoint(run: Run, tmp_path: Path, share: float) -> None:
    whole = run.checkpoint(2).read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(InputError, match=r"^--checkpoint: .*cut\.ckpt is damaged or no checkpoint"):
        read_checkpoint(tmp_path / "cut.ckpt")


def test_checkpoint_of_another_program(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "global_step": 3}, tmp_path / "other.ckpt")
    with pytest.raises(InputError, match=r"^--checkpoint: .*was not written by laco_train fit"):
        read_checkpoint(tmp_path / "other.ckpt")
    with pytest.raises(InputError, match=r"^--checkpoint: no file"):
        read_checkpoint(tmp_path / "missing.ckpt")
