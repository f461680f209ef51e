"""A wheel built from the sdist works by itself: outside the checkout, in an environment that holds nothing else."""

import json
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent
SHIPPED = [(kind, path.name) for kind in ("recipes", "data") for path in sorted((ROOT / kind).glob("*.*"))]

PROBE = """
import json, sys
import laco_train
from laco_train.recipes import find
wanted = json.loads(sys.argv[1])
print(json.dumps([laco_train.__file__, *(str(find(kind, name)) for kind, name in wanted)]))
"""


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Paths, as an installed wheel reports them, of the package and of every file of SHIPPED."""
    folder = tmp_path_factory.mktemp("packaging")
    # Without --wheel, build makes the sdist first and the wheel from it: so the sdist is proved complete too.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", ROOT, cwd=folder)
    (wheel,) = (folder / "dist").glob("laco_train-*.whl")
    venv.create(folder / "env", with_pip=False, symlinks=True)
    python = folder / "env" / "bin" / "python"
    options = ["--disable-pip-version-check", "--no-index", "--no-deps"]
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel, cwd=folder)
    return [Path(line) for line in json.loads(run(python, "-I", "-c", PROBE, json.dumps(SHIPPED), cwd=folder))]


def test_wheel_is_imported_from_its_own_environment(found: list[Path]) -> None:
    assert found[0].parent.parent.name == "site-packages"
    assert not found[0].is_relative_to(ROOT)


def test_wheel_finds_each_recipe_and_data_file(found: list[Path]) -> None:
    package = found[0].parent
    assert found[1:] == [package / "shipped" / kind / name for kind, name in SHIPPED]
    for path, (kind, name) in zip(found[1:], SHIPPED, strict=True):
        assert path.read_bytes() == (ROOT / kind / name).read_bytes()


def test_something_is_shipped() -> None:
    assert {"austen.jsonl.gz", "calibration_en.txt", "calibration_zh.txt"} <= {n for k, n in SHIPPED if k == "data"}
    assert any(kind == "recipes" for kind, _ in SHIPPED)


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize(
    ("name", "accepted", "refused"),
    [
        ("torch", ["2.11.0", "2.12.1", "2.13.0+cpu", "2.14.1"], ["2.10.0"]),
        ("transformers", ["5.17.0", "5.20.2", "5.23.0"], ["5.16.1"]),
        ("lightning", ["2.6.4", "2.6.6"], ["2.6.2", "2.6.3", "2.7.0"]),
    ],
)
def test_dependency_ranges(project: dict, name: str, accepted: list[str], refused: list[str]) -> None:
    (wanted,) = (r for r in map(Requirement, project["dependencies"]) if r.name == name)
    assert [v for v in accepted if v not in wanted.specifier] == []
    assert [v for v in refused if v in wanted.specifier] == []


def test_nothing_is_pinned_but_torch_in_the_constraints(project: dict) -> None:
    listed = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    assert [r for r in listed if any(s.operator in ("==", "===") for s in Requirement(r).specifier)] == []
    assert (ROOT / "constraints.txt").read_text().split() == ["torch==2.13.0"]


def test_python_range(project: dict) -> None:
    wanted = SpecifierSet(project["requires-python"])
    assert [v for v in ("3.10", "3.11", "3.12", "3.13") if v in wanted] == ["3.11", "3.12"]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="an unpacked sdist has no list of files")
def test_no_file_points_outside_the_repository() -> None:
    # Spelt in parts, so that this file does not find itself.
    outside = [b"../" + b"shared", b"/work" + b"/", b"/" + b".library"]
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    files = [ROOT / name for name in listed if name and (ROOT / name).is_file()]
    assert ROOT / "pyproject.toml" in files
    assert [str(path) for path in files if any(word in path.read_bytes() for word in outside)] == []
