"""benchmarks/quality.py writes studies that the program takes, with every arm at the depth that is asked for."""

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from laco_train.cli.study import checked, parser

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))  # its scripts import each other by name

import quality as quality_benchmark  # noqa: E402
from quality import ARMS, PARTS, SWEPT, Quality, append, is_left, kept_rows  # noqa: E402


def row(arm: str, depth: int, seed: int = 0, machine: str = "a card") -> dict[str, Any]:
    """Of a run with plain loss."""
    named = {"strategy": arm, "depth": depth, "seed": seed, "objective": "plain"}
    return {**named, "learning_rate": 0.002, "machine": machine}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A results file that is not there yet."""
    monkeypatch.setattr(quality_benchmark, "RESULTS_FILE", tmp_path / "quality.json")
    return tmp_path / "quality.json"


def test_what_has_its_rows_is_not_run_again(results: Path, tmp_path: Path) -> None:
    quality = Quality(tmp_path, (), (0, 1), (1e-3,))
    rows = [row("sleb", 22, 0), row("sleb", 22, 1), row("angular", 22, 0)]
    rows += [row("original", 30, seed, "another card") for seed in (0, 1)]
    results.write_text(json.dumps({"rows": rows}))
    left = [arm for arm in ("sleb", "angular", "original") if is_left(quality, "plain", 22, arm)]
    assert left == ["angular", "original"]
    assert is_left(quality, "plain", 25, "sleb") and not is_left(quality, "plain", 25, "original")
    append([row("sleb", 22, 0)])
    assert len(kept_rows()) == 5


@pytest.mark.parametrize(("objective", "depth"), [("plain", 22), ("plain", 15), ("distilled", 25)])
def test_its_studies_are_valid(objective: str, depth: int, tmp_path: Path, results: Path) -> None:
    swept = (objective, depth) == SWEPT
    if not swept:
        rows = [row(arm, 30 if arm == "original" else 22) for arm in ARMS]
        results.write_text(json.dumps({"rows": rows}))
    (tmp_path / f"optipfair_{depth}.json").write_text(json.dumps(list(range(30 - depth))))  # else it needs the weights
    quality = Quality(tmp_path, (), (0, 1), (5e-4, 1e-3))
    path = quality.recipe(objective, depth, (*ARMS, *PARTS))
    with contextlib.chdir(tmp_path), contextlib.redirect_stdout(io.StringIO()):
        config = parser().parse_args(["--recipe", str(path)])
        study, arms = checked(config, path.stem, parser())
    assert sorted(arms) == sorted([arm for arm in ARMS if arm != "original" or depth == 22] + list(PARTS) * swept)
    recipes = {task.arm: study.recipe(task, None if not swept else 1e-3) for task in study.tasks(arms)}
    for arm, recipe in recipes.items():
        collapse = recipe["collapse"]
        left = 30 - len(collapse["remove"]) if collapse["remove"] else collapse["target_depth"] or 30
        assert left == (30 if arm == "original" else depth)
        assert recipe["budget"]["max_tokens"] == 10_000_000
        assert study.settings.sweeps == swept
        assert swept or study.rate(arm) == (0.002, "arm")
        assert recipe["model"]["distill"]["logits"] == (0.5 if objective == "distilled" else 0.0)
    assert recipes["best"]["collapse"]["refine"]["tokens"] > 0
    assert recipes["angular"]["collapse"]["refine"]["tokens"] == 0
    if swept:
        assert (recipes["windows"]["collapse"]["refine"] | {"windows": 0}) == (
            recipes["best"]["collapse"]["refine"] | {"windows": 0, "tokens": 65_536}
        )
        assert recipes["together"]["collapse"]["refine"]["windows"] == 0


def test_a_rate_that_was_chosen_is_not_sought_again(results: Path, tmp_path: Path) -> None:
    results.write_text(json.dumps({"rows": [row("sleb", 22, 0)]}))
    path = Quality(tmp_path, (), (1,), (5e-4, 1e-3)).recipe(*SWEPT, ("sleb", "angular"))
    with contextlib.chdir(tmp_path), contextlib.redirect_stdout(io.StringIO()):
        study, _ = checked(parser().parse_args(["--recipe", str(path)]), path.stem, parser())
    assert study.rate("sleb") == (0.002, "arm") and study.settings.sweeps
    with pytest.raises(SystemExit, match="angular has no learning rate yet"):
        Quality(tmp_path, (), (1,), (1e-3,)).recipe("plain", 25, ("sleb", "angular"))
