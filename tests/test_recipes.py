"""Every recipe in the repository, against the program's own parser: no model is loaded."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from laco_train.cli import main
from laco_train.cli.trainer import RecipeCLI
from laco_train.settings import CollapseSettings

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")  # how the program itself calls it
WANTED = ["llama2_7b", "llama2_13b", "llama3_8b", "qwen3_8b", "mistral_7b", "gemma2_9b", "baichuan2_7b"]


def by_name(path: Path) -> str:
    return path.stem


def verb_of(path: Path) -> str:
    return "study" if path.stem.endswith(("_study", "_ratios")) else "fit"


def parsed(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What the recipe's verb makes of it, defaults filled in."""
    with pytest.raises(SystemExit) as end:
        if verb_of(path) == "study":
            main(["study", "--recipe", str(path), "--print_config"])
        RecipeCLI(["fit", "--recipe", str(path), "--print_config"], path.stem)
    assert end.value.code == 0
    values: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return values


def test_there_is_a_recipe_for_each_model() -> None:
    assert {f"{name}_collapse" for name in WANTED} <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=by_name)
def test_the_program_reads_it(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every key is known and of the right type, and none of its values gets lost."""
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    read = parsed(path, capsys)
    seeds = "seed_everything" if verb_of(path) == "fit" else "study"
    assert written.keys() >= {seeds, "model", "collapse", "data", "trainer", "export"}
    lost = [where for where, value in leaves(written) if dict(leaves(read)).get(where) != value]
    assert lost == []


def leaves(values: dict[str, Any], where: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        found += leaves(value, f"{where}{key}.") if isinstance(value, dict) else [(f"{where}{key}", value)]
    return found


@pytest.mark.parametrize("path", RECIPES, ids=by_name)
def test_each_key_has_a_comment(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    keys = [line for line in lines if re.match(r"\s*\w+: \S", line)]
    assert len(keys) > 30
    assert [line for line in keys if not re.search(r"  # \w", line)] == []


@pytest.mark.parametrize("path", RECIPES, ids=by_name)
def test_the_first_comment_holds_the_command(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    head = lines[: lines.index("")]
    assert all(line.startswith("#") for line in head)
    assert re.fullmatch(rf"#   python -m laco_train {verb_of(path)} --recipe {re.escape(path.name)}( .+)?", head[1])


@pytest.mark.parametrize("path", RECIPES, ids=by_name)
def test_a_number_of_the_paper_says_at_which_hand(path: Path) -> None:
    """C and T that aren't the defaults of this project's own models name where they come from."""
    text = path.read_text(encoding="utf-8")
    if "smollm2" in path.stem:
        assert "paper's setting" not in text
        return
    for key in ("layers_per_merge", "similarity_threshold"):
        (line,) = re.findall(rf"^  {key}: .*$", text, re.M)
        assert re.search("second hand|first hand|as there|our own choice|null: the highest", line), line


def test_gemma2_takes_the_type_of_the_first_layer(capsys: pytest.CaptureFixture[str]) -> None:
    values = parsed(ROOT / "recipes" / "gemma2_9b_collapse.yaml", capsys)["collapse"]
    assert CollapseSettings(**values).mixed_types == "first"


def test_baichuan2_is_calibrated_in_two_languages(capsys: pytest.CaptureFixture[str]) -> None:
    values = parsed(ROOT / "recipes" / "baichuan2_7b_collapse.yaml", capsys)["collapse"]
    both = (ROOT / "data" / CollapseSettings(**values).calibration).read_text(encoding="utf-8")  # type: ignore[operator]
    single = [(ROOT / "data" / f"calibration_{name}.txt").read_text(encoding="utf-8") for name in ("en", "zh")]
    assert both == "".join(single)
