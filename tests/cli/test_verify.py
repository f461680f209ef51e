"""`verify`: one line for each wrong file of an export, exit code 2; 0 for a whole one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from laco_train.cli import main
from laco_train.manifest import MANIFEST, write_manifest
from tests.cli.runs import environment


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "x" / "adapter").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "adapter/adapter_model.safetensors"):
        (tmp_path / "x" / name).write_bytes(name.encode() * 100)
    write_manifest(tmp_path / "x", {"format": "hf"})
    return tmp_path / "x"


def verify(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str], list[str]]:
    code = main(["verify", str(folder)])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err.splitlines()


def test_a_whole_export(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = verify(folder, capsys)
    assert (code, err) == (0, [])
    assert out == [f"{folder} is whole: 3 files, 0.0 MB, as they were exported."]


def test_each_wrong_file_has_its_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[700] ^= 1
    weights.write_bytes(content)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    code, out, err = verify(folder, capsys)
    assert code == 2
    assert out == [
        "adapter/adapter_model.safetensors: is missing",
        "config.json: has 2 bytes, not 1,100",
        "model.safetensors: has other content than was exported (sha256)",
    ]
    assert err == [
        f"laco_train: error: verify: 3 of 3 files in {folder} are wrong; copy or export it again",
    ]


def test_a_run_has_its_export_inside(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export = folder.rename(folder.parent / "export")
    code, out, err = verify(export.parent, capsys)
    assert (code, out) == (2, [])
    assert err == [f"laco_train: error: verify: {export.parent} has no {MANIFEST}; its export is {export}"]


def test_a_file_of_someone_else_is_no_damage(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    code, out, _ = verify(folder, capsys)
    assert code == 0
    assert out[1:] == ["Not of the export: notes.txt."]


def test_without_a_manifest(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / MANIFEST).unlink()
    for place in (folder, folder / "nowhere"):
        code, out, err = verify(place, capsys)
        assert (code, out) == (2, [])
        assert err == [f"laco_train: error: verify: {place} has no {MANIFEST}; name a folder that laco_train exported"]


def change(values: dict[str, Any], key: str, value: Any) -> str:
    return json.dumps({**values, key: value})


@pytest.mark.parametrize(
    "spoil",
    [
        lambda values: "",
        lambda values: json.dumps(values)[:-20],
        lambda values: "[]",
        lambda values: "null",
        lambda values: "\ud800",
        lambda values: change(values, "files", []),
        lambda values: change(values, "files", {"config.json": None}),
        lambda values: change(values, "files", {"config.json": {"size": "much", "sha256": ""}}),
        lambda values: change(values, "files", {"../x/config.json": {"size": 2, "sha256": ""}}),
        lambda values: change(values, "files", {"/etc/passwd": {"size": 2, "sha256": ""}}),
        lambda values: change(values, "export", None),
        lambda values: change(values, "format_version", 99),
        lambda values: json.dumps({key: value for key, value in values.items() if key != "files"}),
    ],
)
def test_a_damaged_manifest_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str], spoil: Any) -> None:
    path = folder / MANIFEST
    path.write_bytes(spoil(json.loads(path.read_text(encoding="utf-8"))).encode("utf-8", errors="surrogatepass"))
    code, out, err = verify(folder, capsys)
    assert (code, out) == (2, [])
    assert len(err) == 1
    assert err[0].startswith(f"laco_train: error: verify: {path} is ")


def test_nothing_heavy_is_imported(folder: Path) -> None:
    program = """
import sys
from laco_train.cli import main
code = main(["verify", sys.argv[1]])
heavy = sorted({"torch", "lightning", "transformers", "numpy"} & set(sys.modules))
sys.exit(f"imported {heavy}" if heavy else code)
"""
    command = [sys.executable, "-c", program, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("as they were exported.\n")
