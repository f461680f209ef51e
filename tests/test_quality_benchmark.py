"""benchmarks/quality.py writes studies that the program takes, with every arm at the depth that is asked for."""

import contextlib
import io
import json
import sys
from pathlib import Path

import pytest

from laco_train.cli.study import checked, parser

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))  # its scripts import each other by name

from quality import ARMS, Quality  # noqa: E402


@pytest.mark.parametrize(("objective", "depth"), [("plain", 22), ("plain", 15), ("distilled", 25)])
def test_its_studies_are_valid(objective: str, depth: int, tmp_path: Path) -> None:
    (tmp_path / f"optipfair_{depth}.json").write_text(json.dumps(list(range(30 - depth))))  # else it needs the weights
    quality = Quality(tmp_path, (), (0, 1), (5e-4, 1e-3))
    path = quality.recipe(objective, depth, ARMS)
    with contextlib.chdir(tmp_path), contextlib.redirect_stdout(io.StringIO()):
        config = parser().parse_args(["--recipe", str(path)])
        study, arms = checked(config, path.stem, parser())
    assert arms == list(ARMS)
    recipes = {task.arm: study.recipe(task, 1e-3) for task in study.tasks(arms)}
    for arm, recipe in recipes.items():
        collapse = recipe["collapse"]
        left = 30 - len(collapse["remove"]) if collapse["remove"] else collapse["target_depth"] or 30
        assert left == (30 if arm == "original" else depth)
        assert recipe["budget"]["max_tokens"] == 10_000_000
        assert recipe["model"]["distill"]["logits"] == (0.5 if objective == "distilled" else 0.0)
    assert recipes["best"]["collapse"]["refine"]["tokens"] > 0
    assert recipes["angular"]["collapse"]["refine"]["tokens"] == 0
