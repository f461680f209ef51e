"""Rounds on two processes, which Lightning starts once for all of them."""

from pathlib import Path

import yaml

from laco_train.collapse import CollapsePlan
from tests.cli.runs import RECIPE
from tests.distributed.conftest import DATA, DDP, Ranks

ROUNDS = [{"target_depth": 5, "max_tokens": 256}, {"target_depth": 3, "max_tokens": 384}]


def test_every_rank_goes_through_all_rounds(ranks: Ranks) -> None:
    collapse = {**RECIPE["collapse"], "similarity_threshold": None}
    recipe = {**RECIPE, "collapse": collapse, "rounds": ROUNDS, "trainer": {**RECIPE["trainer"], "max_steps": -1}}
    root = ranks.project.root
    (root / "rounds.yaml").write_text(yaml.safe_dump(recipe))
    result = ranks("fit", "--recipe", "rounds.yaml", *DATA, *DDP)
    assert result.code == 0, result.err
    (folder,) = Path(root / "lightning_logs" / "rounds").iterdir()
    lines = [line for line in result.out.splitlines() if line.startswith("Round ")]
    assert lines[-1].startswith("Round 2: 5 -> 3 layers") and len(lines) == 4  # told by one rank
    plan = CollapsePlan.load(folder / "export" / "collapse_plan.json")
    assert (plan.source_depth, plan.depth, [one.trained for one in plan.rounds]) == (6, 3, [0, 256])
