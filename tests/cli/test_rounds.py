"""`fit` with rounds: each collapses what the one before trained; killed anywhere, one command goes on."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.soak import content, curves
from laco_train.collapse import CollapsePlan
from laco_train.study.read import read_runs
from tests.cli.processes import Moment, ended, kill, start, until
from tests.cli.runs import RECIPE, Project, Result, events, make_project, scalars
from tests.evaluation.conftest import mini_suite

__all__ = ["mini_suite"]

ROUNDS: list[dict[str, Any]] = [
    {"target_depth": 5, "max_tokens": 384, "learning_rate": 0.01},
    {"target_depth": 3, "max_tokens": 512, "learning_rate": 0.004},
]
STEPS = (6, 8)  # of 64 tokens
FIT = ["fit", "--recipe", "rounds.yaml"]
RESUME = [*FIT, "--resume", "auto"]


def rounds_recipe(project: Project) -> Project:
    """Adds rounds.yaml; its steps can be watched in batches-0.txt."""
    trainer = {**RECIPE["trainer"], "max_steps": -1, "callbacks": [{"class_path": "benchmarks.soak.RecordBatches"}]}
    collapse = {**RECIPE["collapse"], "similarity_threshold": None}
    recipe = {**RECIPE, "collapse": collapse, "trainer": trainer, "rounds": ROUNDS}
    (project.root / "rounds.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return project


def fitted(project: Project, *arguments: str) -> Path:
    """Folder of a run that succeeds."""
    result = project(*FIT, *arguments)
    assert result.code == 0, result.err
    return project.root / "lightning_logs" / "rounds" / "version_0"


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def refused(project: Project, *arguments: str) -> str:
    """The one line of error; nothing was written."""
    before = project.files()
    result: Result = project(*FIT, *arguments)
    assert result.code == 2, result
    assert project.files() == before
    line = result.err.splitlines()[-1]
    assert "Traceback" not in result.err + result.out
    return line.removeprefix("laco_train: error: ")


@pytest.fixture(scope="module")
def done(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Project:
    """A project whose one run went through both rounds."""
    project = rounds_recipe(make_project(tmp_path_factory.mktemp("rounds") / "p", tiny_llama(), tiny_tokenizer))
    fitted(project)
    return project


@pytest.fixture(scope="module")
def folder(done: Project) -> Path:
    return done.root / "lightning_logs" / "rounds" / "version_0"


@pytest.fixture
def own(project: Project) -> Project:
    """A project of its own for one test."""
    return rounds_recipe(project)


def test_each_round_is_a_run_and_the_export_lies_where_any_run_has_it(folder: Path) -> None:
    assert [path.name for path in folder.parent.iterdir()] == ["version_0"]
    whole = {"collapse_plan.json", "config.yaml", "export", "round_1", "round_2", "rounds.json", "summary.json"}
    assert {path.name for path in folder.iterdir()} == whole | {".in_use"}
    common = {"checkpoints", "collapse_plan.json", "config.yaml", "hparams.yaml", "summary.json", ".in_use"}
    for name, more in (("round_1", {"export"}), ("round_2", set())):
        found = {path.name for path in (folder / name).iterdir() if not path.name.startswith("events.")}
        assert found == common | more
    assert yaml.safe_load((folder / "config.yaml").read_text())["rounds"] == ROUNDS


def test_a_round_begins_with_what_the_one_before_trained(folder: Path) -> None:
    first, second = (read(folder / name / "summary.json") for name in ("round_1", "round_2"))
    assert second["losses"]["original"] == pytest.approx(first["losses"]["trained"], abs=1e-6)
    assert (first["source_depth"], first["depth"], second["source_depth"], second["depth"]) == (6, 5, 5, 3)
    exported = AutoModelForCausalLM.from_pretrained(folder / "round_1" / "export")
    assert exported.dtype == torch.float32
    (checkpoint,) = (folder / "round_1" / "checkpoints").iterdir()
    trained = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(value, trained[f"model.{name}"]) for name, value in exported.state_dict().items())
    config = yaml.safe_load((folder / "round_2" / "config.yaml").read_text())
    assert Path(config["model"]["source"]).parts[-2:] == ("round_1", "export")


def test_budget_learning_rate_and_schedule_are_each_rounds_own(folder: Path) -> None:
    for index, one in enumerate(ROUNDS):
        place = folder / f"round_{index + 1}"
        assert read(place / "summary.json")["tokens"] == one["max_tokens"]
        rates = [value for _, value in scalars(events(place), "train/learning_rate")]
        assert len(rates) == STEPS[index]
        assert max(rates) == pytest.approx(one["learning_rate"], rel=0.01)
        assert rates[0] == pytest.approx(one["learning_rate"] / 2, rel=0.01)  # two steps of warm-up
        assert rates[-1] < 0.4 * one["learning_rate"]


def test_the_second_round_reads_in_another_order(done: Project, folder: Path) -> None:
    lines = [line.split() for line in (done.root / "batches-0.txt").read_text().splitlines()]
    digests = [digest for _, _, digest in lines]
    assert len(digests) == sum(STEPS)
    assert digests[: STEPS[0]] != digests[STEPS[0] : 2 * STEPS[0]]
    seeds = [yaml.safe_load((folder / f"round_{k}" / "config.yaml").read_text())["data"]["seed"] for k in (1, 2)]
    assert seeds == [0, 1]


def test_the_last_plan_names_original_layers(folder: Path) -> None:
    first, second = (CollapsePlan.load(folder / name / "collapse_plan.json") for name in ("round_1", "round_2"))
    whole = CollapsePlan.load(folder / "collapse_plan.json")
    assert CollapsePlan.load(folder / "export" / "collapse_plan.json") == whole
    layers = [[old for index in layer for old in first.lineage[index]] for layer in second.lineage]
    assert [list(layer) for layer in whole.lineage] == layers
    assert sorted(index for layer in layers for index in layer) == list(range(6))
    assert (whole.source, whole.source_depth, whole.depth) == ("model", 6, 3)
    assert [one.trained for one in whole.rounds] == [0, 384]
    card = (folder / "export" / "README.md").read_text()
    for new, layer in enumerate(layers):
        origin = f"{', '.join(map(str, layer))} merged" if len(layer) > 1 else str(layer[0])
        assert f"| {new} | {origin} |" in card
    assert "2. from 5 to 3 layers, after training on 384 tokens" in card
    assert f"{sum(STEPS) * 64} tokens in {sum(STEPS)} optimizer steps" in card


def test_the_last_plan_is_not_applied(done: Project, folder: Path) -> None:
    line = refused(done, "--rounds=null", "--trainer.max_steps=2", f"--collapse.plan={folder / 'collapse_plan.json'}")
    assert line.startswith("collapse.plan: is composed of 2 rounds with training between them")


def test_the_export_is_what_the_last_round_trained(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "export")
    (checkpoint,) = (folder / "round_2" / "checkpoints").iterdir()
    trained = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert {f"model.{name}" for name in model.state_dict()} == set(trained)
    assert all(torch.equal(value, trained[f"model.{name}"]) for name, value in model.state_dict().items())


def test_export_of_a_checkpoint_names_original_layers_too(done: Project, folder: Path) -> None:
    (checkpoint,) = (folder / "round_2" / "checkpoints").iterdir()
    result = done("export", "--checkpoint", str(checkpoint), "--output", "again")
    assert result.code == 0, result.err
    assert CollapsePlan.load(done.root / "again/collapse_plan.json") == CollapsePlan.load(folder / "collapse_plan.json")
    shutil.rmtree(done.root / "again")


def test_record_and_curve_over_all_rounds(folder: Path) -> None:
    ones = [read(folder / f"round_{k}" / "summary.json") for k in (1, 2)]
    records = read(folder / "rounds.json")["rounds"]
    assert [(r["source_depth"], r["depth"]) for r in records] == [(6, 5), (5, 3)]
    assert [(r["tokens_before"], r["tokens_after"]) for r in records] == [(0, 384), (384, 896)]
    for record, one in zip(records, ones, strict=True):
        losses = one["losses"]
        assert record["losses"] == {
            "before": losses["original"],
            "collapsed": losses["collapsed"],
            "trained": losses["trained"],
        }
    whole = read(folder / "summary.json")
    assert (whole["source"], whole["source_depth"], whole["depth"]) == ("model", 6, 3)
    assert (whole["tokens"], whole["steps"]) == (896, 14)
    assert whole["losses"] == {**ones[0]["losses"], "trained": ones[1]["losses"]["trained"]}
    points = [(p["round"], p["step"], p["tokens"], p["loss"]) for p in whole["validation"]]
    expected = [(1, p["step"], p["tokens"], p["loss"]) for p in ones[0]["validation"]]
    expected += [(2, p["step"] + 6, p["tokens"] + 384, p["loss"]) for p in ones[1]["validation"]]
    assert points == expected
    seconds = [p["seconds"] for p in whole["validation"]]
    assert seconds == sorted(seconds)


def test_finished_run_is_left_alone(done: Project) -> None:
    before = done.files()
    result = done(*FIT, "--resume", "auto")
    assert (result.code, result.out.splitlines()[-1].endswith("is finished: there is nothing to resume.")) == (0, True)
    assert done.files() == before


TWO = "[{target_depth: 4}, {target_depth: 3}]"
BAD = [
    (["--rounds=[]"], "rounds: is empty"),
    (
        ["--rounds=[{target_depth: 4}, {target_depth: 4}]"],
        "rounds[1].target_depth: is 4, but the round before leaves 4",
    ),
    (["--rounds=[{target_depth: 6}]"], "rounds[0].target_depth: is 6, but the model has 6"),
    (["--rounds=[{target_depth: 5}, {target_depth: 0}]"], "collapse.target_depth: must be 1 or more"),
    (["--rounds=[{target_depth: 5, max_tokens: 0}]"], "rounds[0].max_tokens: must be 1 or more"),
    (["--rounds=[{target_depth: 5, learning_rate: 0}]"], "rounds[0].learning_rate: must be above 0"),
    (["--rounds=[{depth: 5}]"], "rounds"),
    (["--collapse.plan=plan.json"], "collapse.plan: goes not with rounds"),
    (["--collapse.remove=[1]"], "collapse.remove: goes not with rounds"),
    (["--collapse.target_ratio=0.3"], "collapse.target_ratio: goes not with rounds"),
    (["--collapse.target_depth=3"], "collapse.target_depth: goes not with rounds"),
    (["--collapse.similarity_threshold=0.5"], "collapse.target_depth: goes not with collapse.similarity_threshold"),
    (["--collapse.strategy=none"], "collapse.strategy: none keeps every layer"),
    (["--collapse.highest_layer=6"], "collapse.highest_layer: H is 6, more than the model's 5 layers"),
    (["--model.from_scratch=true"], "model.from_scratch: goes not with rounds"),
    (["--trainer.logger=false"], "trainer.logger: rounds need fit's own logger"),
    (["--ckpt_path=x.ckpt"], "--ckpt_path: goes not with rounds"),
    (["--data.batch_size=1000"], "data.batch_size: "),
]


@pytest.mark.parametrize(("arguments", "words"), BAD)
def test_bad_input_is_one_line_before_anything_is_written(done: Project, arguments: list[str], words: str) -> None:
    assert refused(done, *arguments).startswith(words)


def test_bad_input_found_late_leaves_no_folder(own: Project) -> None:
    assert refused(own, "--data.train=missing.jsonl").startswith("data.train: no file matches")
    assert not (own.root / "lightning_logs").exists()


def test_a_disk_too_small_is_told_before_the_start(own: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(own.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    assert refused(own).startswith("trainer.default_root_dir: 0.00 GiB of disk are needed, 0.00 are free")


def test_other_verbs_read_the_recipe(own: Project) -> None:
    result = own("validate", "--recipe", "rounds.yaml", "--collapse.target_depth=5")
    assert result.code == 0, result.err
    result = own("collapse", "--recipe", "rounds.yaml", "--output", "new", "--collapse.target_depth=5")
    assert result.code == 0, result.err


def test_adapters_are_merged_between_rounds(own: Project) -> None:
    folder = fitted(own, "--model.method=lora", "--model.lora.rank=2")
    records = read(folder / "rounds.json")["rounds"]
    assert records[1]["losses"]["before"] == pytest.approx(records[0]["losses"]["trained"], abs=1e-4)
    assert records[1]["losses"]["trained"] < records[1]["losses"]["collapsed"]
    assert (folder / "round_1" / "adapter").is_dir()
    assert (folder / "adapter").is_dir()
    assert AutoModelForCausalLM.from_pretrained(folder / "export").config.num_hidden_layers == 3


def test_the_original_teaches_by_the_lineage_of_all_rounds(own: Project) -> None:
    folder = fitted(own, "--model.distill.hidden=1.0")
    configs = [yaml.safe_load((folder / f"round_{k}" / "config.yaml").read_text()) for k in (1, 2)]
    assert [config["model"]["distill"]["teacher"] for config in configs] == [None, "model"]
    # of six layers, which the round's own plan knows nothing about
    assert scalars(events(folder / "round_2"), "train/distill_hidden")


def test_weights_are_handed_on_in_the_type_they_are_trained_in(own: Project) -> None:
    folder = fitted(own, "--export.dtype=bfloat16")
    assert read(folder / "round_1" / "export" / "config.json")["dtype"] == "float32"
    assert read(folder / "export" / "config.json")["dtype"] == "bfloat16"


def test_exports_between_rounds_go_if_told_to(own: Project, folder: Path) -> None:
    fresh = fitted(own, "--export.keep_rounds=false")
    assert not (fresh / "round_1" / "export").exists()
    assert CollapsePlan.load(fresh / "collapse_plan.json").lineage == (
        CollapsePlan.load(folder / "collapse_plan.json").lineage
    )
    result = own(*FIT, "--export.keep_rounds=false", "--resume=auto")
    assert result.out.splitlines()[-1].endswith("is finished: there is nothing to resume.")


def test_a_changed_round_is_refused_on_resume(own: Project, folder: Path) -> None:
    copied = own.root / "lightning_logs" / "rounds" / "version_0"
    shutil.copytree(folder, copied)
    (copied / "summary.json").unlink()
    line = refused(own, "--resume=auto", f"--rounds={TWO}")
    assert line.startswith("--resume: the recipe is not that of ") and "rounds: [" in line


def batches(root: Path) -> int:
    path = root / "batches-0.txt"
    return len(path.read_text().splitlines()) if path.exists() else 0


def left(folder: Path) -> set[str]:
    """Names of all files of a folder of rounds; those of events tell the time."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("events.")]
    return {str(path.relative_to(folder)) for path in paths}


def same_folder(one: Path, other: Path) -> None:
    """Assert that two folders of rounds hold the same, but for what the clock says."""
    names = left(one)
    assert names == left(other)
    assert "export/model.safetensors" in names
    plain = [name for name in names if "export" in Path(name).parts or name.endswith(".json")]
    assert [name for name in plain if content(one / name) != content(other / name)] == []
    rounds = sorted(path.name for path in one.glob("round_*"))
    assert len(rounds) > 1
    for name in rounds:
        assert curves(one / name) == curves(other / name)
        (mine,), (theirs,) = ((folder / name / "checkpoints").iterdir() for folder in (one, other))
        first, second = (torch.load(path, weights_only=True)["state_dict"] for path in (mine, theirs))
        assert first.keys() == second.keys()
        assert [name for name in first if not torch.equal(first[name], second[name])] == []


# in round 1 after a checkpoint; once round 1 is at its end; in round 2 before and after its first checkpoint
@pytest.mark.parametrize("second", ["between the rounds", "2", "5"])
def test_killed_twice_it_ends_like_an_unbroken_run(own: Project, folder: Path, second: str) -> None:
    root, run = own.root, own.root / "lightning_logs" / "rounds" / "version_0"
    process = start(root, RESUME)
    until(process, lambda: batches(root) >= 5)
    kill(process)
    assert (run / "round_1" / "checkpoints").is_dir() and not (run / "round_1" / "summary.json").exists()
    process = start(root, RESUME)
    until(process, (run / "round_1" / "summary.json").exists)
    if second != "between the rounds":
        begun = batches(root)
        until(process, lambda: batches(root) >= begun + int(second))
    kill(process)
    assert not (run / "round_2" / "summary.json").exists()
    assert ended(start(root, RESUME)) == 0, (root / "output.txt").read_text()
    same_folder(folder, run)


AFTER_TRAINING = {
    "export half written": Moment("open", r"version_0/export\.partial-\d+/tokenizer_config\.json"),
    "export proven, without its card": Moment("open", r"version_0/export\.partial-\d+/README\.md"),
    "export whole, without its name": Moment("os.rename", "version_0/export"),
    "no summary of the last round": Moment("os.rename", r"round_2/summary\.json"),
    "no plan of all rounds": Moment("os.rename", r"version_0/collapse_plan\.json"),
    "no record of the last round": Moment("os.rename", r"version_0/rounds\.json", time=2),  # once as it goes on
    "no summary of all rounds": Moment("os.rename", r"version_0/summary\.json"),
}


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """A project whose run was killed while it wrote the last export."""
    root = tmp_path_factory.mktemp("trained") / "p"
    rounds_recipe(make_project(root, tiny_llama(), tiny_tokenizer))
    end = AFTER_TRAINING["export half written"]
    assert ended(start(root, RESUME, end)) == -signal.SIGKILL, (root / "output.txt").read_text()
    assert batches(root) == sum(STEPS)
    return root


@pytest.mark.parametrize("second", AFTER_TRAINING.values(), ids=AFTER_TRAINING)
def test_killed_twice_after_training_it_ends_like_an_unbroken_run(
    trained: Path, folder: Path, tmp_path: Path, second: Moment
) -> None:
    root = shutil.copytree(trained, tmp_path / "p")
    run = root / "lightning_logs" / "rounds" / "version_0"
    assert ended(start(root, RESUME, second)) == -signal.SIGKILL, (root / "output.txt").read_text()
    assert not (run / "summary.json").exists()
    assert ended(start(root, RESUME)) == 0, (root / "output.txt").read_text()
    assert batches(root) == sum(STEPS)  # no step was done twice
    same_folder(folder, run)


def test_killed_while_exports_between_rounds_go(own: Project) -> None:
    """Once after round 2 of 3, then as round 3 begins, and once at the end."""
    rounds = [{"target_depth": depth, "max_tokens": 192} for depth in (5, 4, 3)]
    more = [f"--rounds={json.dumps(rounds)}", "--export.keep_rounds=false"]
    unbroken = fitted(own, *more).rename(own.root / "unbroken")
    root, run = own.root, own.root / "lightning_logs" / "rounds" / "version_0"
    removing = Moment("os.remove", r"^[^/]+\.json", time=3)  # shutil.rmtree's, which have no folder

    def killed(end: Moment) -> int:
        """Rounds on record then."""
        assert ended(start(root, [*RESUME, *more], end)) == -signal.SIGKILL, (root / "output.txt").read_text()
        return len(read(run / "rounds.json")["rounds"])

    def half_removed(export: Path) -> bool:
        return 0 < len(list(export.iterdir())) < len(list((unbroken / "export").iterdir()))

    assert killed(removing) == 2
    assert half_removed(run / "round_1" / "export")
    assert killed(Moment("open", r"batches-0\.txt")) == 2
    assert not (run / "round_1" / "export").exists()
    assert killed(removing) == 3
    assert half_removed(run / "round_2" / "export")
    assert ended(start(root, [*RESUME, *more])) == 0, (root / "output.txt").read_text()
    same_folder(unbroken, run)


def test_tasks_and_samples_go_on_from_round_to_round(own: Project, mini_suite: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra evaluation")
    tasks = ["--evaluation.tasks=[piqa]", f"--evaluation.suite={mini_suite}", "--evaluation.samples=true"]
    folder = fitted(own, *tasks)
    whole, first, second = (read(folder / name / "summary.json") for name in (".", "round_1", "round_2"))
    steps = [(one["step"], one["tokens"]) for one in whole["evaluation"]]
    assert steps == [(0, 0), (6, 384), (6, 384), (14, 896)]
    values = [one["value"] for one in whole["evaluation"]]
    assert values == [one["value"] for part in (first, second) for one in part["evaluation"]]
    (run,) = read_runs(folder)
    assert [one.tokens for one in run.accuracies] == [0, 384, 384, 896]
    assert whole["samples"] == run.samples == {**second["samples"], "original": first["samples"]["original"]}
    card = (folder / "export" / "README.md").read_text(encoding="utf-8")
    assert f"| piqa | acc_norm | {values[2]:.3f} ± " in card
