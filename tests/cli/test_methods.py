"""Whole runs of each method and of distillation: what trains, what the checkpoint holds, resume, export."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from laco_train.collapse import CollapsePlan, apply_plan
from laco_train.models.gguf import cache_root
from tests.cli.runs import KEEP_ALL, Project, Run, events, make_project, same_bytes, scalars

LAST = ["--model.method", "last_layers", "--model.last_layers", "1", "--model.optimizer.learning_rate", "0.003"]
DEVICE = ["--model.distill.logits", "0.5", "--model.distill.temperature", "2", "--model.distill.hidden", "0.5"]
PRECOMPUTED = [*DEVICE, "--model.distill.precomputed", "true"]
TAGS = {"train/next_token_loss", "train/distill_logits", "train/distill_hidden"}


def resumed_equals(project: Project, whole: Run, step: int, options: list[str]) -> Run:
    resumed = project.fit("--ckpt_path", str(whole.checkpoint(step)), *options)
    expected, found = whole.state(), resumed.state()
    assert found["state_dict"].keys() == expected["state_dict"].keys()
    assert [n for n, w in found["state_dict"].items() if not torch.equal(w, expected["state_dict"][n])] == []
    torch.testing.assert_close(found["optimizer_states"], expected["optimizer_states"], rtol=0, atol=0)
    assert resumed.validation() == whole.validation()
    same_bytes(whole.folder / "export", resumed.folder / "export")
    return resumed


def exported(run: Run) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(run.folder / "export")


def collapsed(project: Project, run: Run) -> LlamaForCausalLM:
    model = AutoModelForCausalLM.from_pretrained(project.root / "model")
    return apply_plan(model, CollapsePlan.load(run.folder / "collapse_plan.json"))


def changed(project: Project, run: Run) -> set[str]:
    before, after = collapsed(project, run).state_dict(), exported(run).state_dict()
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.fixture(scope="module")
def last(shared_project: Project) -> Run:
    """A fit of the last layer and the head."""
    return shared_project.fit(*LAST, *KEEP_ALL)


def test_last_layers_alone_change_and_are_kept(shared_project: Project, last: Run) -> None:
    depth = exported(last).config.num_hidden_layers
    names = changed(shared_project, last)
    assert {name.rpartition(".layers.")[2].partition(".")[0] for name in names if ".layers." in name} == {
        str(depth - 1)
    }
    assert {name for name in names if ".layers." not in name} == {"model.norm.weight", "lm_head.weight"}
    assert set(last.state()["state_dict"]) == {f"model.{name}" for name in names}
    (optimizer,) = last.state()["optimizer_states"]
    assert len(optimizer["state"]) == len(names)
    losses = [loss for _, loss in scalars(events(last.folder), "train/loss")]
    assert losses[-1] < losses[0] - 0.2


def test_last_layers_resume_exactly(shared_project: Project, last: Run) -> None:
    resumed_equals(shared_project, last, 2, LAST)


def test_last_layers_validate_and_export_from_the_checkpoint(shared_project: Project, last: Run) -> None:
    before = set(shared_project.root.glob("lightning_logs/tiny/*"))
    options = ["--ckpt_path", str(last.checkpoint()), *LAST]
    assert shared_project("validate", "--recipe", "tiny.yaml", *options).code == 0
    (folder,) = set(shared_project.root.glob("lightning_logs/tiny/*")) - before
    ((_, loss),) = scalars(events(folder), "val/loss")
    assert loss == pytest.approx(last.validation()[-1], rel=1e-6)
    output = shared_project.root / "exported"
    result = shared_project("export", "--checkpoint", str(last.checkpoint()), "--output", str(output))
    assert result.code == 0, result.err
    same_bytes(output, last.folder / "export")
    assert "its last layers and its head were trained" in (output / "README.md").read_text()


def test_tied_head_is_the_embedding(
    tmp_path: Path, tiny_llama: Callable[..., LlamaForCausalLM], tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    project = make_project(tmp_path / "tied", tiny_llama(tie_word_embeddings=True), tiny_tokenizer)
    run = project.fit(*LAST, *KEEP_ALL)
    names = {name for name in run.state()["state_dict"] if ".layers." not in name}
    assert names == {"model.model.embed_tokens.weight", "model.model.norm.weight"}
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= changed(project, run)
    model = exported(run)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    resumed_equals(project, run, 4, LAST)


def test_more_last_layers_than_are_left_is_one_line(project: Project) -> None:
    before = project.files()
    result = project("fit", "--recipe", "tiny.yaml", *LAST, "--model.last_layers", "6")
    assert result.code == 2
    assert result.err.splitlines()[-1].startswith("laco_train: error: model.last_layers: is 6, but the model has")
    assert project.files().keys() == before.keys()


def divergence_from_original(project: Project, model: LlamaForCausalLM) -> float:
    """Mean KL from the original's next-token distribution on some text, in nats, float64."""
    original = AutoModelForCausalLM.from_pretrained(project.root / "model")
    ids = torch.randint(4, 300, (4, 32), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        p, q = (m(ids).logits.double().log_softmax(-1) for m in (original, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture(scope="module")
def distilled(shared_project: Project) -> Run:
    """A fit with the teacher on the device, by logits and hidden states."""
    return shared_project.fit(*DEVICE, *KEEP_ALL)


def test_parts_of_the_loss_are_logged_and_add_up(distilled: Run, run: Run) -> None:
    logged = events(distilled.folder)
    total, entropy, apart, hidden = (
        dict(scalars(logged, tag))
        for tag in (
            "train/loss",
            "train/next_token_loss",
            "train/distill_logits",
            "train/distill_hidden",
        )
    )
    assert len(total) == 6
    for step, value in total.items():
        assert value == pytest.approx(0.5 * entropy[step] + 0.5 * apart[step] + 0.5 * hidden[step], rel=1e-5)
        assert min(apart[step], hidden[step]) > 0.01
    plain = events(run.folder)
    assert TAGS & set(plain.Tags()["scalars"]) == set()
    assert entropy[min(entropy)] == pytest.approx(dict(scalars(plain, "train/loss"))[min(entropy)], rel=1e-5)


def test_validation_loss_stays_that_of_the_next_token(distilled: Run, run: Run) -> None:
    assert distilled.validation()[0] == run.validation()[0]
    assert distilled.validation()[-1] < 1.5 * run.validation()[-1]


def test_teacher_reaches_neither_checkpoint_nor_optimizer_nor_export(distilled: Run, run: Run) -> None:
    one, other = distilled.state(), run.state()
    assert one["state_dict"].keys() == other["state_dict"].keys()
    assert len(one["optimizer_states"][0]["state"]) == len(other["optimizer_states"][0]["state"])
    names = {path.name for path in (distilled.folder / "export").iterdir()}
    assert names == {path.name for path in (run.folder / "export").iterdir()}


def test_distilled_run_resumes_exactly(shared_project: Project, distilled: Run) -> None:
    resumed = resumed_equals(shared_project, distilled, 2, DEVICE)
    assert set(events(resumed.folder).Tags()["scalars"]) >= TAGS


def test_it_comes_closer_to_the_original(project: Project) -> None:
    options = ["--model.distill.logits", "1", "--model.optimizer.learning_rate", "0.003", "--trainer.max_steps", "24"]
    run = project.fit(*options)
    before = divergence_from_original(project, collapsed(project, run))
    after = divergence_from_original(project, exported(run))
    assert 0 < after < 0.9 * before
    points = [value for _, value in scalars(events(run.folder), "train/distill_logits")]
    assert sum(points[-4:]) < 0.8 * sum(points[:4])


def lessons() -> set[Path]:
    return {path for path in (cache_root() / "lessons").glob("*") if path.is_dir()}


@pytest.mark.parametrize("method", ["full", "lora", "last_layers"])
def test_precomputed_teacher_is_made_once_and_resumes_exactly(project: Project, method: str) -> None:
    options = [*PRECOMPUTED, "--model.method", method, "--model.last_layers", "1"]
    reseed(project, {"full": 11, "lora": 12, "last_layers": 13}[method])  # so that no other test has its lessons
    before = lessons()
    whole = project.fit(*options, *KEEP_ALL)
    (folder,) = lessons() - before
    written = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert set(written) == {"outcomes", "ids", "hidden"}
    assert "Keeping what the teacher says" in whole.result.out
    resumed = resumed_equals(project, whole, 4, options)
    assert "Keeping" not in resumed.result.out
    assert lessons() - before == {folder}
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == written


def reseed(project: Project, seed: int) -> None:
    """Other random weights for the project's model."""
    folder = project.root / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)


def first_losses(project: Project, options: list[str]) -> dict[str, float]:
    run = project.fit(*options, "--trainer.max_steps", "2", "--export.enabled", "false")
    logged = events(run.folder)
    return {tag: scalars(logged, tag)[0][1] for tag in sorted({"train/loss", *TAGS})}


def test_precomputed_teacher_says_what_the_one_on_the_device_does(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = first_losses(project, DEVICE)
    few = first_losses(project, PRECOMPUTED)
    assert few["train/distill_hidden"] == pytest.approx(device["train/distill_hidden"], rel=1e-5)
    assert 0.2 * device["train/distill_logits"] < few["train/distill_logits"] < device["train/distill_logits"]
    monkeypatch.setattr("laco_train.training.teacher.TOP", 320)
    assert first_losses(project, PRECOMPUTED) == pytest.approx(device, rel=1e-5)


def test_lessons_keep_their_precision_where_the_model_has_less(project: Project) -> None:
    half = ["--trainer.precision", "bf16-true"]
    device, few = first_losses(project, [*DEVICE, *half]), first_losses(project, [*PRECOMPUTED, *half])
    assert few["train/distill_hidden"] == pytest.approx(device["train/distill_hidden"], rel=0.02)
    assert 0.2 * device["train/distill_logits"] < few["train/distill_logits"] < device["train/distill_logits"]


def test_another_teacher(project: Project, tiny_folder: Callable[..., Path]) -> None:
    other = ["--model.distill.teacher", str(tiny_folder(layers=2, seed=9))]
    own = first_losses(project, DEVICE[:4])
    taught = first_losses(project, [*DEVICE[:4], *other])
    assert taught["train/next_token_loss"] == own["train/next_token_loss"]
    assert taught["train/distill_logits"] != pytest.approx(own["train/distill_logits"], rel=1e-2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model.distill.logits=0.5", "--model.distill.teacher=wide"], "wide has a vocabulary of 400, and"),
        (["--model.distill.hidden=1", "--model.distill.teacher=flat"], "flat has a depth of 2, and"),
        (["--model.distill.logits=0.5", "--model.distill.teacher=nowhere"], "there is no folder 'nowhere' here"),
        (["--model.distill.teacher=flat"], "is set, but model.distill.logits and hidden are both 0; raise one"),
    ],
)
def test_a_teacher_that_cannot_teach_is_one_line(
    project: Project, tiny_llama: Callable[..., LlamaForCausalLM], options: list[str], said: str
) -> None:
    tiny_llama(layers=2, vocab_size=400).save_pretrained(project.root / "wide")
    tiny_llama(layers=2).save_pretrained(project.root / "flat")
    before = project.files()
    result = project("fit", "--recipe", "tiny.yaml", *options)
    assert result.code == 2
    assert result.err.splitlines()[-1].startswith(f"laco_train: error: model.distill.teacher: {said}")
    assert project.files().keys() == before.keys()
