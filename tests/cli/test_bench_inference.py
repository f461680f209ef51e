"""`bench-inference` on real folders of tiny models, from its command line to its file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from tests.cli.runs import Project, environment

QUICK = ["--batch-sizes", "1,3", "--prompt-tokens", "16", "--new-tokens", "4", "--turns", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def collapsed(shared_project: Project) -> str:
    """A model of fewer layers, made by the program."""
    result = shared_project("collapse", "--recipe", "tiny.yaml", "--output", "collapsed")
    assert result.code == 0, result.err
    return "collapsed"


def test_table_and_numbers(shared_project: Project, collapsed: str) -> None:
    result = shared_project("bench-inference", "original=model", collapsed, *QUICK)
    assert result.code == 0, result.err
    values = json.loads((shared_project.root / "inference.json").read_text(encoding="utf-8"))
    original, less = values["models"]
    assert (original["name"], original["source"], less["name"]) == ("original", "model", "collapsed")
    assert original["layers"] == 6 > less["layers"]
    assert original["parameters"] > less["parameters"]
    assert values["versions"]["torch"] == torch.__version__
    assert values["versions"]["transformers"] == transformers.__version__
    assert values["workload"] == {"batches": [1, 3], "prompt": 16, "new": 4, "turns": 2}
    assert "CPU" in values["device"] and "CPU" in result.out
    for model in (original, less):
        assert [batch["batch"] for batch in model["batches"]] == [1, 3]
        for batch in model["batches"]:
            for name in ("first_token_seconds", "prefill_tokens_per_second", "decode_tokens_per_second", "gib"):
                figure = batch[name]
                assert 0 < figure["low"] <= figure["median"] <= figure["high"]
                assert (figure["ratio"] == 1) == (model is original)
    assert less["batches"][0]["gib"]["ratio"] < 1
    rows = [line.split() for line in result.out.splitlines() if "float32" in line]
    assert [row[:3] for row in rows] == [
        [batch, name, layers]
        for batch in "13"
        for name, layers in (("original", "6"), (collapsed, str(less["layers"])))
    ]


def test_bad_input_writes_nothing(shared_project: Project, tmp_path: Path) -> None:
    damaged = shared_project.root / "damaged"
    damaged.mkdir()
    for file in (shared_project.root / "model").iterdir():
        os.link(file, damaged / file.name)
    (damaged / "model.safetensors").unlink()
    (damaged / "model.safetensors").write_bytes(b"\x08")
    before = shared_project.files()
    for arguments, problem in (
        ([], " models: is missing"),
        (["model", "model"], "models: two models are called model; name them"),
        (["none/model"], "model: there is no folder 'none/model'"),
        (["damaged"], "models: damaged can't be measured (model.source: can't read the weights of damaged"),
        (["model", "--batch-sizes", "1,0"], "--batch-sizes: must be different whole numbers from 1"),
        (["model", "--batch-sizes", "2,2"], "--batch-sizes: must be different"),
        (["model", "--batch-sizes", "two"], "--batch-sizes: must be different"),
        (["model", "--turns", "0"], "--turns: must be 1 or more, is 0"),
        (["model", "--new-tokens", "0"], "--new-tokens: must be 1 or more"),
        (["model", "--prompt-tokens", "250"], "--prompt-tokens: and --new-tokens are 282 together, more than the 256"),
        (["model", "--dtype", "int8"], "dtype: "),
        (["model", "--device", "abacus"], "--device: abacus can't be used"),
        (["model", "--output", "tiny.yaml"], "--output: tiny.yaml exists"),
        (["model", "--output", "none/x.json"], "--output: none/x.json is in no folder"),
    ):
        result = shared_project("bench-inference", "--output", "new.json", *arguments)
        assert result.code == 2, arguments
        assert problem in result.err.splitlines()[-1], result.err
        assert "Traceback" not in result.err
    assert shared_project.files() == before


def test_the_home_folder(shared_project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    result = shared_project("bench-inference", "model", *QUICK, "--output=~/speed.json")
    assert result.code == 0, result.err
    assert (tmp_path / "speed.json").is_file()


def test_help_imports_no_torch() -> None:
    code = (
        "import sys\nfrom laco_train.cli import main\n"
        "try:\n    main(['bench-inference', '--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'lightning', 'transformers'} & set(sys.modules), 'heavy import'"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert found.returncode == 0, found.stderr
    assert "--batch-sizes" in found.stdout
