"""A fit from recipe to export: what lies where, what the optimizer held, and runs of other kinds."""

import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from laco_train.collapse import CollapsePlan, collapse_model
from laco_train.models import load_model, load_tokenizer
from laco_train.settings import CollapseSettings
from tests.cli.runs import CALIBRATION, TRAIN, VALIDATION, Project, Run, write_lines

COLLAPSE = CollapseSettings(layers_per_merge=2, similarity_threshold=0.3, calibration=CALIBRATION)


def test_layout_of_a_run(run: Run) -> None:
    assert run.folder.parts[-3:] == ("lightning_logs", "tiny", "version_0")
    names = {p.name for p in run.folder.iterdir() if not p.name.startswith("events.out.tfevents")}
    whole = {"checkpoints", "collapse_plan.json", "config.yaml", "export", "hparams.yaml", "summary.json"}
    assert names == whole | {".in_use"}  # held while the run is being written
    assert len(list(run.folder.glob("events.out.tfevents*"))) == 1
    assert [p.name for p in run.folder.parent.iterdir()] == ["version_0"]


def test_config_of_a_run_is_a_recipe(run: Run, shared_project: Project) -> None:
    printed = shared_project("fit", "--recipe", str(run.folder / "config.yaml"), "--print_config")
    assert printed.code == 0
    config = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert config["model"]["source"] == "model"
    assert config["model"]["optimizer"]["learning_rate"] == 0.01
    assert yaml.safe_load(printed.out) == config


def test_plan_of_a_run_is_the_librarys(run: Run, shared_project: Project) -> None:
    source = str(shared_project.root / "model")
    _, plan = collapse_model(load_model(source, dtype=torch.float32), load_tokenizer(source), COLLAPSE)
    saved = CollapsePlan.load(run.folder / "collapse_plan.json")
    assert saved.merges == plan.merges != ()
    assert saved.lineage == plan.lineage
    assert saved.source == "model"
    assert saved == CollapsePlan.load(run.folder / "export" / "collapse_plan.json")


def test_export_is_the_last_checkpoint(run: Run) -> None:
    model = AutoModelForCausalLM.from_pretrained(run.folder / "export")
    weights = model.state_dict()
    trained = run.state()["state_dict"]
    assert {f"model.{name}" for name in weights} == set(trained)
    assert [name for name in weights if not torch.equal(weights[name], trained[f"model.{name}"])] == []
    assert model.config.num_hidden_layers == run.summary()["depth"] == 4


def test_the_card_names_the_texts(run: Run) -> None:
    card = (run.folder / "export" / "README.md").read_text(encoding="utf-8")
    assert "- train: `train.jsonl`, 1,888 tokens in 40 documents and 59 blocks (sha256 " in card
    assert "- validation: `validation.jsonl`, 352 tokens in 8 documents and 11 blocks (sha256 " in card


def test_summary_sums_up(run: Run) -> None:
    summary = run.summary()
    assert (summary["source"], summary["source_depth"], summary["depth"]) == ("model", 6, 4)
    assert (summary["steps"], summary["tokens"]) == (6, 6 * 2 * 32)
    points = [(p["step"], p["tokens"]) for p in summary["validation"]]
    assert points == [(0, 0), (2, 128), (4, 256), (6, 384)]
    losses = run.validation()
    assert summary["losses"]["collapsed"] == losses[0]
    assert summary["losses"]["trained"] == losses[-1] < losses[0]
    assert "No GPU is used" in run.result.out
    assert f"{summary['losses']['original']:.4f}" in run.result.out
    assert "after training" in run.result.out


def test_optimizer_holds_the_surviving_parameters_alone(run: Run) -> None:
    state = run.state()
    (optimizer,) = state["optimizer_states"]
    weights = state["state_dict"]
    survivors = [weights[name] for name in weights if ".layers." not in name or int(name.split(".")[3]) < 4]
    assert len(survivors) == len(weights)
    assert sorted(tuple(s["exp_avg"].shape) for s in optimizer["state"].values()) == sorted(
        tuple(w.shape) for w in weights.values()
    )
    matrices, vectors = optimizer["param_groups"]
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    shapes = {id: tuple(s["exp_avg"].shape) for id, s in optimizer["state"].items()}
    assert {len(shapes[id]) for id in matrices["params"]} == {2}
    assert {len(shapes[id]) for id in vectors["params"]} == {1}
    assert len(vectors["params"]) == 2 * 4 + 1  # the norms


def test_command_line_wins_over_the_recipe(project: Project) -> None:
    run = project.fit("--trainer.max_steps", "2", "--collapse.remove", "[1, 4]", "--export.enabled", "false")
    assert run.summary()["steps"] == 2
    plan = json.loads((run.folder / "collapse_plan.json").read_text())
    assert (plan["strategy"], plan["removed"]) == ("remove", [1, 4])
    assert not (run.folder / "export").exists()


def test_each_run_gets_its_own_version(project: Project) -> None:
    fast = ["--trainer.max_steps", "2", "--export.enabled", "false"]
    assert [project.fit(*fast).folder.name for _ in range(2)] == ["version_0", "version_1"]


def test_end_that_is_no_validation_is_validated(project: Project) -> None:
    run = project.fit("--trainer.max_steps", "3", "--export.enabled", "false")
    assert [p["step"] for p in run.summary()["validation"]] == [0, 2, 3]


def test_accumulated_batches_give_the_step_of_the_large_batch(project: Project) -> None:
    # one document, so that every block has as many targets; a large epsilon makes AdamW's step linear in the gradient
    (project.root / "train.txt").write_text(" ".join(TRAIN), encoding="utf-8")
    options = ["--trainer.max_steps=2", "--export.enabled=false", "--model.optimizer.epsilon=0.1"]
    options += ["--data.train=train.txt"]
    one = project.fit(*options)
    halves = ["--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=4", "--data.batch_size=1"]
    other = project.fit(*options, *halves)
    assert one.summary()["tokens"] == other.summary()["tokens"] == 2 * 2 * 32
    assert other.validation() == pytest.approx(one.validation(), rel=1e-6)
    weights, accumulated = one.state(2)["state_dict"], other.state(2)["state_dict"]
    torch.testing.assert_close(accumulated, weights, rtol=1e-5, atol=1e-6)


def test_chat(project: Project) -> None:
    turns = [
        [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is the number {i}."}]
        for i in range(40)
    ]
    write_lines(project.root / "chat.jsonl", turns[:30], "messages")
    write_lines(project.root / "held_out.jsonl", turns[30:], "messages")
    data = ["--data.format", "chat", "--data.train", "chat.jsonl", "--data.validation", "held_out.jsonl"]
    run = project.fit(*data, "--data.block_size", "64")
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "export")
    targets = sum(len(tokenizer(f"{conversation[1]['content']}<|im_end|>").input_ids) for conversation in turns[30:])
    assert f"({targets:,} tokens)" in run.result.out
    losses = run.validation()
    assert losses[-1] < losses[0]


def test_bfloat16_weights_keep_rotary_frequencies_in_float32(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    from laco_train.cli.trainer import RecipeCLI

    monkeypatch.chdir(project.root)
    options = ["--trainer.precision", "bf16-true", "--trainer.max_steps", "2"]
    cli = RecipeCLI(["fit", "--recipe", "tiny.yaml", *options], "tiny")
    exact = dict(load_model("model", dtype=torch.float32).named_buffers())
    buffers = dict(cli.model.lm.named_buffers())
    assert exact.keys() == buffers.keys() != set()
    assert [name for name in exact if not torch.equal(exact[name], buffers[name])] == []
    assert {p.dtype for p in cli.model.lm.parameters()} == {torch.bfloat16}
    exported = AutoModelForCausalLM.from_pretrained("lightning_logs/tiny/version_0/export", dtype="auto")
    assert exported.dtype == torch.bfloat16


def test_a_run_ends_after_epochs_too(project: Project) -> None:
    run = project.fit(
        *("--trainer.max_steps", "-1", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "4"),
        "--export.enabled=false",
    )
    assert run.summary()["steps"] == 4
    (optimizer,) = run.state(4)["optimizer_states"]
    # the cosine ends with the run: the rate for a step past it is the final one
    assert optimizer["param_groups"][0]["lr"] == pytest.approx(0.01 * 0.1)


def test_fit_fails_where_the_export_would_not_fit(project: Project) -> None:
    options = ["fit", "--recipe=tiny.yaml", "--trainer.max_steps=2", "--trainer.logger=false"]
    assert project(*options).code == 0
    (project.root / "config.yaml").unlink()  # of a run no trace but its export
    before = project.files()
    assert "export/model.safetensors" in before
    again = project(*options)
    assert (again.code, project.files()) == (2, before)
    assert again.err.startswith("laco_train: error: export: ")


def test_calibration_text_in_the_validation_data_is_reported(project: Project) -> None:
    both = json.dumps([VALIDATION[3], CALIBRATION[0]])
    said = project.fit("--collapse.calibration", both, "--export.enabled", "false").result.out
    assert "Warning: 1 calibration samples also occur in the validation data" in said
    assert "Warning" not in project.fit("--export.enabled", "false").result.out


def test_the_model_trains_in_training_mode(project: Project) -> None:
    project.fit("--trainer.callbacks+=tests.cli.runs.TrainingMode", "--trainer.max_steps", "3")


def test_losses_of_bfloat16_weights_are_summed_in_float32(project: Project) -> None:
    losses = project.fit("--trainer.precision", "bf16-true").validation()
    assert [loss for loss in losses if loss == float(torch.tensor(loss).bfloat16())] == []
