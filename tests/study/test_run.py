"""Studies from start to end: three arms, two seeds; cut off, gone on with, failed in part, refused."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from benchmarks.soak import content, curves
from laco_train.errors import TrainingStopped
from laco_train.study.journal import STUDY_FILE
from laco_train.study.outcome import print_outcome
from laco_train.study.read import read_runs
from laco_train.study.unlike import unlike
from tests.cli.runs import Project, environment
from tests.cli.test_help import PROBE
from tests.cli.test_resume_auto import Stopped, at
from tests.study.studies import Outcome, fit_here, forget_stop, ready, study_of, write_recipe

ARMS, SEEDS = ("original", "laco", "scratch"), (0, 1)
NAMES = [f"{arm}-seed{seed}" for seed in SEEDS for arm in ARMS]


@pytest.fixture(scope="module")
def whole(shared_project: Project) -> Outcome:
    """An unbroken study."""
    write_recipe(shared_project)
    return study_of(shared_project)


def summary(outcome: Outcome, name: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((outcome.run(name) / "summary.json").read_text())
    return values


def test_every_arm_runs_with_every_seed_under_one_budget(whole: Outcome) -> None:
    for name in NAMES:
        values = summary(whole, name)
        assert [(point["step"], point["tokens"]) for point in values["validation"]] == [
            (0, 0), (2, 128), (3, 192), (4, 256), (6, 384)
        ]  # fmt: skip
        assert values["depth"] == (6 if name.startswith("original") else 4)
        assert (whole.run(name) / "export" / "model.safetensors").is_file()


def test_arms_see_the_same_blocks_in_an_order_of_the_seed(whole: Outcome) -> None:
    sums = {summary(whole, name)["data"][role]["sha256"] for name in NAMES for role in ("validation",)}
    assert len(sums) == 1
    assert unlike([run for name in NAMES for run in read_runs(whole.run(name))]) == []
    configs = {name: yaml.safe_load((whole.run(name) / "config.yaml").read_text()) for name in NAMES}
    for arm in ARMS:
        seeds = [(configs[f"{arm}-seed{seed}"]["seed_everything"], configs[f"{arm}-seed{seed}"]["data"]["seed"])
                 for seed in SEEDS]  # fmt: skip
        assert seeds == [(0, 0), (1, 1)]
    ends = [summary(whole, f"laco-seed{seed}")["losses"] for seed in SEEDS]
    assert ends[0]["collapsed"] == ends[1]["collapsed"]
    assert ends[0]["trained"] != ends[1]["trained"]


def test_scratch_has_the_plan_of_laco_and_weights_of_its_seed(whole: Outcome) -> None:
    laco, scratch = (json.loads((whole.run(f"{arm}-seed0") / "collapse_plan.json").read_text()) for arm in ARMS[1:])
    assert scratch["lineage"] == laco["lineage"]
    starts = [summary(whole, name)["losses"]["collapsed"] for name in ("scratch-seed0", "scratch-seed1", "laco-seed0")]
    assert len(set(starts)) == 3


def test_journal_tells_what_was_asked_and_what_became_of_it(whole: Outcome) -> None:
    journal = json.loads((whole.study.folder / STUDY_FILE).read_text())
    assert (journal["arms"], journal["seeds"], journal["max_tokens"]) == (list(ARMS), [0, 1], 384)
    assert {(run["arm"], run["seed"], run["state"]) for run in journal["runs"]} == {
        (arm, seed, "finished") for arm in ARMS for seed in SEEDS
    }
    assert all(run["learning_rate"] == 0.01 and run["ended"] >= run["began"] for run in journal["runs"])
    assert journal["ended"] is not None


def test_finished_runs_are_skipped(whole: Outcome, shared_project: Project) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.study.folder.rglob("*.ckpt")}
    again = study_of(shared_project, fit=refuse)
    assert again.lines == [f"{name}: finished before, skipped" for name in NAMES]
    assert {path: path.stat().st_mtime_ns for path in whole.study.folder.rglob("*.ckpt")} == before


def refuse(arguments: list[str], log: Path) -> int:
    raise AssertionError(arguments)


def stopping(name: str, step: int) -> Any:
    """A fit that ends without notice, as if killed, in one run after so many steps."""

    def fit(arguments: list[str], log: Path) -> int:
        if not arguments[-1].endswith(name):
            return fit_here(arguments, log)
        try:
            fit_here([*arguments, *at(step, "stop")], log)
        finally:
            forget_stop(log.parent / "version_0")
        raise AssertionError

    return fit


@pytest.mark.parametrize("step", [1, 5])  # before the first checkpoint, and after the second
def test_study_killed_in_an_arm_goes_on_to_the_same_end(project: Project, whole: Outcome, step: int) -> None:
    write_recipe(project, {"study": {"seeds": [1]}})
    cut, go = ready(project, fit=stopping("laco-seed1", step))
    with pytest.raises(Stopped):
        go()
    states = {run["arm"]: run["state"] for run in json.loads((cut.study.folder / STUDY_FILE).read_text())["runs"]}
    assert states == {"original": "finished", "laco": "running", "scratch": "waiting"}
    again = study_of(project)
    assert again.lines[0] == "original-seed1: finished before, skipped"
    assert again.lines[1].startswith("s/laco-seed1: goes on")
    for arm in ARMS:
        same_run(whole.run(f"{arm}-seed1"), again.run(f"{arm}-seed1"))


def same_run(one: Path, other: Path) -> None:
    """Assert that two runs left the same, but for what the clock says."""
    assert content(one / "summary.json") == content(other / "summary.json")
    assert curves(one) == curves(other)
    first, second = (load_file(folder / "export" / "model.safetensors") for folder in (one, other))
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert {path.name for path in one.glob("checkpoints/*")} == {path.name for path in other.glob("checkpoints/*")}


def test_one_arm_alone_and_the_others_later(project: Project, whole: Outcome) -> None:
    write_recipe(project, {"study": {"seeds": [0]}})
    alone = study_of(project, "--arms", "scratch")
    assert sorted(path.name for path in alone.study.folder.glob("*-seed*")) == ["scratch-seed0"]
    same_run(whole.run("scratch-seed0"), alone.run("scratch-seed0"))
    rest = study_of(project, "--arms", "laco,scratch")
    assert rest.lines[-1] == "scratch-seed0: finished before, skipped"
    same_run(whole.run("laco-seed0"), rest.run("laco-seed0"))


@pytest.mark.parametrize("keep_going", [True, False])
def test_failed_arm_is_told_in_a_line_and_tried_again(project: Project, keep_going: bool) -> None:
    broken = {"model": {"optimizer": {"learning_rate": 1e30}}}
    changes = {"study": {"seeds": [0], "arms": {"laco": broken}, "keep_going": keep_going}}
    write_recipe(project, changes)
    outcome, go = ready(project)
    with pytest.raises(TrainingStopped, match=r"^1 of 3 runs failed: laco-seed0$"):
        go()
    (line,) = [line for line in outcome.lines if line.startswith("laco-seed0: failed: ")]
    assert "at step" in line and "(exit code 1)" in line
    assert (outcome.run("scratch-seed0") / "summary.json").is_file() == keep_going
    entries = json.loads((outcome.study.folder / STUDY_FILE).read_text())["runs"]
    assert [run["state"] for run in entries] == ["finished", "failed", "finished" if keep_going else "waiting"]
    assert entries[1]["problem"] in line


def refused(project: Project, *arguments: str) -> str:
    before = project.files()
    result = project("study", "--recipe", "s.yaml", *arguments)
    assert result.code == 2, result.err
    assert project.files() == before
    (line,) = [line for line in result.err.splitlines() if line.startswith("laco_train: error: ")]
    return line.removeprefix("laco_train: error: ")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"study": {"arms": {"lacco": {}}}}, "study.arms: there is no arm 'lacco'; the arms are original, laco,"),
        ({"study": {"arms": {"laco": {"data": {}}}}}, "study.arms.laco.data: can't differ"),
        ({"study": {"arms": {"laco": 3}}}, "study.arms.laco: must hold sections"),
        ({"study": {"arms": {"laco": {"collapse": {"rule": "mean"}}}}}, "study.arms.laco: collapse.rule: is unknown"),
        ({"study": {"arms": {"laco": {"model": {"last_layers": 0}}}}}, "study.arms.laco: model.last_layers: must be 1"),
        ({"study": {"arms": {"scratch": {"model": {"method": "lora"}}}}}, "study.arms.scratch: model.from_scratch: "),
        ({"study": {"seeds": [0, 1, 0]}}, "study.seeds: names a seed twice: [0, 1, 0]"),
        ({"study": {"seeds": []}}, "study.seeds: is empty"),
        ({"study": {"learning_rates": [0.1, 0.1]}}, "study.learning_rates: names a rate twice"),
        ({"study": {"learning_rates": [0.1, 0.2], "sweep_share": 0.1}}, "study.sweep_share: is less than a step of 64"),
        ({"collapse": {"target_depth": None}}, "collapse.target_depth: is what all arms are collapsed to"),
        ({"budget": {"max_tokens": None}}, "budget.max_tokens: is null"),
        ({"budget": {"evaluate_at": [0.01, 1.0]}}, "budget.max_tokens: 384 tokens are too few for evaluation at 0 and"),
        ({"budget": {"evaluate_at": [0.5, 0.6]}}, "budget.max_tokens: 384 tokens are too few for evaluation at 0.5"),
        ({"budget": {"evaluate_at": [1.5]}}, "budget.evaluate_at: must be shares above 0, 1 at most"),
        ({"trainer": {"max_stops": 3}}, "trainer.max_stops: is unknown here"),
        ({"trainer": {"logger": "false"}}, "trainer.logger: goes not with a study"),
        ({"data": {"sed": 3}}, "data.sed: is unknown here"),
    ],
)
def test_bad_input_is_one_line(shared_project: Project, changes: dict[str, Any], said: str) -> None:
    write_recipe(shared_project, changes)
    assert refused(shared_project).startswith(said)


def test_unknown_arm_of_the_command_line(shared_project: Project) -> None:
    write_recipe(shared_project)
    line = "--arms: there is no arm 'sleb'; the arms are original, laco, scratch"
    assert refused(shared_project, "--arms", "laco,sleb") == line


def test_other_recipe_than_what_has_begun_is_refused(whole: Outcome, shared_project: Project) -> None:
    write_recipe(shared_project, {"budget": {"max_tokens": 768}})
    assert refused(shared_project).startswith("budget.max_tokens: was 384 when ")
    write_recipe(shared_project)


def test_disk_is_checked_before_the_start(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    write_recipe(project)
    free = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr("laco_train.study.disk.shutil.disk_usage", lambda place: free)
    assert "GiB of disk are needed" in refused(project)


HOLD = {
    "flock": "import sys, filelock; f = filelock.FileLock(sys.argv[1]); f.acquire(); print(flush=True); input()",
    "lockf": "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()",
}


@contextlib.contextmanager
def held_elsewhere(path: Path, how: str) -> Iterator[None]:
    """Another process holds the lock `path` meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", HOLD[how], str(path)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    holder.stdout.readline()
    try:
        yield
    finally:
        holder.communicate("\n")


@pytest.mark.parametrize(("held", "how"), [("s/.laco.lock", "flock"), ("s/laco-seed0/version_0/.in_use", "lockf")])
def test_arm_in_use_is_refused(project: Project, held: str, how: str) -> None:
    write_recipe(project)
    with held_elsewhere(project.root / "lightning_logs" / held, how):
        result = project("study", "--recipe", "s.yaml")
    assert result.code == 2
    assert "another process is writing" in result.err.splitlines()[-1]


def test_two_processes_run_arms_of_one_study(project: Project, whole: Outcome) -> None:
    """Each fit in a process of its own; both write study.json and the report, and lose nothing of the other's."""
    write_recipe(project, {"study": {"seeds": [0]}})
    commands = [[sys.executable, "-m", "laco_train", "study", "--recipe", "s.yaml", "--arms", a] for a in ARMS[1:]]
    both = [
        subprocess.Popen(
            command, cwd=project.root, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for command in commands
    ]
    told = [one.communicate()[0] for one in both]
    assert [one.returncode for one in both] == [0, 0], told
    folder = project.root / "lightning_logs" / "s"
    journal = json.loads((folder / STUDY_FILE).read_text())
    assert {(run["arm"], run["state"], run["learning_rate"]) for run in journal["runs"]} == {
        ("original", "waiting", None), ("laco", "finished", 0.01), ("scratch", "finished", 0.01)
    }  # fmt: skip
    assert sorted(journal["learning_rates"]) == ["laco", "scratch"]
    assert all(run["ended"] >= run["began"] for run in journal["runs"] if run["state"] == "finished")
    report = json.loads((folder / "report" / "report.json").read_text())
    assert sorted(arm["name"] for arm in report["arms"]) == ["laco", "scratch"]
    assert all(arm["speed"] for arm in report["arms"])
    for arm, output in zip(ARMS[1:], told, strict=True):
        same_run(whole.run(f"{arm}-seed0"), folder / f"{arm}-seed0" / "version_0")
        assert "Layer Collapse" in (folder / f"{arm}-seed0" / "fit.log").read_text()
        for words in ("1 of 1 runs are left", "GiB of disk are needed", "Study s", "--logdir lightning_logs/s"):
            assert words in output, output


def test_what_another_process_notes_is_kept_and_what_it_left_behind_is_not(project: Project) -> None:
    write_recipe(project, {"study": {"seeds": [0]}})
    folder = project.root / "lightning_logs" / "s"

    def fit(arguments: list[str], log: Path) -> int:
        values = json.loads((folder / STUDY_FILE).read_text())
        for run in values["runs"]:  # meanwhile, elsewhere
            if run["arm"] != "laco":
                run |= {"state": "running", "began": "2026-01-01T00:00:00+00:00"}
        values["learning_rates"]["scratch"] = {"chosen": 0.5, "how": "arm"}
        (folder / STUDY_FILE).write_text(json.dumps(values))
        return fit_here(arguments, log)

    with held_elsewhere(folder / ".scratch.lock", "flock"):
        study_of(project, "--arms", "laco", fit=fit)
        values = json.loads((folder / STUDY_FILE).read_text())
    noted = {run["arm"]: run for run in values["runs"]}
    assert {arm: run["state"] for arm, run in noted.items()} == {
        "laco": "finished",
        "scratch": "running",
        "original": "waiting",  # nobody holds it: its process was killed
    }
    assert noted["scratch"]["began"] == "2026-01-01T00:00:00+00:00"
    assert values["learning_rates"]["scratch"] == {"chosen": 0.5, "how": "arm"}


def test_speed_is_not_measured_beside_another_arm(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    write_recipe(project, {"study": {"seeds": [0]}})
    outcome = study_of(project, "--arms", "laco")
    with held_elsewhere(outcome.study.folder / ".scratch.lock", "flock"):
        print_outcome(outcome.study)
    assert "Inference is not measured: other processes run scratch; the last to end" in capsys.readouterr().out
    report = outcome.study.folder / "report" / "report.json"
    assert [arm["speed"] for arm in json.loads(report.read_text())["arms"]] == [None]


@pytest.mark.parametrize(
    ("number", "send"),
    [(signal.SIGTERM, os.kill), (signal.SIGINT, os.kill), (signal.SIGINT, os.killpg)],
    ids=["SIGTERM", "SIGINT", "keyboard"],
)
def test_signal_ends_the_arm_and_the_study_at_a_checkpoint(
    project: Project, number: signal.Signals, send: Callable[[int, int], None]
) -> None:
    write_recipe(project, {"budget": {"max_tokens": 64 * 50_000}, "trainer": {"val_check_interval": 100}})
    command = [sys.executable, "-m", "laco_train", "study", "--recipe", "s.yaml", "--arms", "laco"]
    command += ["--study.seeds", "[0]", "--export.enabled", "false"]
    study = subprocess.Popen(
        command, cwd=project.root, env=environment(), stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    folder = project.root / "lightning_logs" / "s" / "laco-seed0"
    while study.poll() is None and not list(folder.glob("version_0/checkpoints/*.ckpt")):
        time.sleep(0.1)
    send(study.pid, number)
    out, _ = study.communicate()
    assert study.returncode == 128 + number
    assert out.splitlines()[-1] == f"{number.name}: stopped; the same command goes on with it."
    (line,) = [line for line in (folder / "fit.log").read_text().splitlines() if re.match("SIG(TERM|INT): ", line)]
    steps = [torch.load(path, weights_only=True)["global_step"] for path in folder.glob("version_0/checkpoints/*.ckpt")]
    assert f"stopped after step {max(steps)}, saved as" in line


def test_help_imports_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(calls=[["study", "--help"]])],
        capture_output=True, text=True, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--arms" in done.stdout and "--study.sweep_share" in done.stdout
