"""`compare` on real runs of a tiny model, from its command line to its folder."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.runs import Project, Run


@pytest.fixture(scope="module")
def runs(shared_project: Project) -> dict[str, Run]:
    """The original trained on, Layer Collapse, and its shape from random weights."""
    return {
        "original": shared_project.fit("--collapse.strategy", "none", "--collapse.similarity_threshold", "null"),
        "laco": shared_project.fit(),
        "scratch": shared_project.fit("--model.from_scratch", "true"),
    }


@pytest.fixture(scope="module")
def report(shared_project: Project, runs: dict[str, Run]) -> tuple[Path, str]:
    """Folder and terminal output of a comparison of all three and of an export by itself."""
    export = runs["laco"].folder / "export"
    result = shared_project("compare", *(str(run.folder) for run in runs.values()), str(export), "--output", "out")
    assert result.code == 0, result.err
    return shared_project.root / "out", result.out


def test_measures_are_those_of_the_runs(report: tuple[Path, str], runs: dict[str, Run]) -> None:
    values = json.loads((report[0] / "report.json").read_text())
    arms = {arm["name"]: arm for arm in values["arms"]}
    assert len(arms) == 4
    ends = {name: run.validation()[-1] for name, run in runs.items()}
    for name, run in runs.items():
        assert [loss for _, loss in arms[name]["losses"]] == run.validation()
        assert arms[name]["parameters"] == run.summary()["parameters"]["after"]
        assert arms[name]["learning_rate"] == 0.01
    inherited = (ends["scratch"] - ends["laco"]) / (ends["scratch"] - ends["original"])
    assert arms["laco"]["inheritance"] == pytest.approx(inherited)
    assert values["original"] == runs["original"].validation()[0]
    assert values["budget"] == runs["laco"].summary()["tokens"]


def test_speed_of_every_export(report: tuple[Path, str]) -> None:
    values = json.loads((report[0] / "report.json").read_text())
    assert all(arm["speed"]["prefill"] > 0 and arm["speed"]["decode"] > 0 for arm in values["arms"])
    assert values["device"]
    page = (report[0] / "index.html").read_text(encoding="utf-8")
    assert "decode tokens/s" in page
    assert "No curve, as they are exports or were not trained: version_1/export." in page


def test_the_terminal_tells_the_result(report: tuple[Path, str]) -> None:
    assert "laco ends at " in report[1]
    assert "| **laco** |" in report[1]
    assert str(Path("out/index.html")) in report[1]


def test_speed_can_be_left_out(shared_project: Project, runs: dict[str, Run]) -> None:
    arguments = ["compare", str(runs["laco"].folder), "--output", "quick", "--speed", "false"]
    assert shared_project(*arguments).code == 0
    assert "decode" not in (shared_project.root / "quick/index.html").read_text(encoding="utf-8")


def test_another_run_can_be_the_reference(shared_project: Project, runs: dict[str, Run]) -> None:
    folders = [str(runs[name].folder) for name in ("laco", "scratch")]
    arguments = ["compare", *folders, "--speed", "false", "--output", "other", "--reference", "laco"]
    assert shared_project(*arguments).code == 0
    arms = json.loads((shared_project.root / "other/report.json").read_text())["arms"]
    assert {arm["name"]: arm["inheritance"] for arm in arms} == {"laco": 1, "scratch": 0}


def test_bad_input_writes_nothing(shared_project: Project, runs: dict[str, Run]) -> None:
    run = str(runs["laco"].folder)
    before = shared_project.files()
    for arguments, problem in (
        ([], "runs: is missing"),
        (["nowhere"], "nowhere: is no run of fit"),
        ([run, "--reference", "sleb"], "--reference: no run is named 'sleb'; there are laco"),
        ([run, "--output", "model"], "--output: model exists and is not empty"),
        ([run, "--speed", "maybe"], "speed"),
    ):
        result = shared_project("compare", *arguments)
        assert result.code == 2, arguments
        assert problem in result.err
        assert result.err.count("\n") == 1
    assert shared_project.files() == before


def test_unlike_validation_data_is_refused_unless_forced(shared_project: Project, runs: dict[str, Run]) -> None:
    other = shared_project.fit("--data.validation", "null", "--data.validation_fraction", "0.3")
    arguments = ["compare", str(runs["laco"].folder), str(other.folder), "--speed", "false", "--output", "unlike"]
    refused = shared_project(*arguments)
    assert refused.code == 2
    assert "validated on unlike data" in refused.err and "--force" in refused.err
    assert not (shared_project.root / "unlike").exists()
    forced = shared_project(*arguments, "--force")
    assert forced.code == 0, forced.err
    assert "validated on unlike data" in (shared_project.root / "unlike/report.md").read_text(encoding="utf-8")


def test_help_imports_no_torch() -> None:
    code = (
        "import sys\nfrom laco_train.cli import main\n"
        "try:\n    main(['compare', '--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'lightning', 'matplotlib'} & set(sys.modules), 'heavy import'"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "--reference" in found.stdout
