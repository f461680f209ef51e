"""Keeps what a study, one over pruning ratios and runs in rounds reached as results, arm by arm.

    python benchmarks/study.py study_smollm2 --arms lightning_logs/smollm2_135m_study/report \\
        --rounds lightning_logs/smollm2_135m_rounds/version_0 lightning_logs/smollm2_135m_at_once/version_0 \\
        --ratios lightning_logs/smollm2_135m_ratios/report \\
        --ran 'python -m laco_train study --recipe smollm2_135m_study.yaml --data.train texts.jsonl.gz'

Run it on the machine that trained, whose name and versions it writes. What is named again replaces what was kept of
that name before; the rest stays, so that arms may come from several calls.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from common import RESULTS, header

KEYS = ("name", "depth", "parameters", "learning_rate", "seeds", "losses", "recovered", "inheritance")
KEYS += ("tokens_to_original", "speed", "train_sha256", "validation_sha256")


def arms_of(report: Path) -> list[dict[str, Any]]:
    """Arms of a report, as `study` and `compare` write it."""
    found = json.loads((report / "report.json").read_text(encoding="utf-8"))
    return [{key: arm[key] for key in KEYS} for arm in found["arms"]]


def ratios_of(report: Path) -> list[dict[str, Any]]:
    """Arms of a report over pruning ratios, at each ratio."""
    found = json.loads((report / "report.json").read_text(encoding="utf-8"))
    shared = {"tokens": found["tokens"], "tasks": found["accuracy_tasks"]}
    return [{"name": f"{level['arm']} at {level['ratio']:g}", **level, **shared} for level in found["levels"]]


def round_of(run: Path) -> dict[str, Any]:
    """A run of fit, in rounds or at once: what it collapsed to, and its losses by tokens."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    return {
        "name": run.resolve().parent.name,
        "depths": [summary["source_depth"], *(one["depth"] for one in summary.get("rounds") or [summary])],
        "parameters": summary["parameters"]["after"],
        "original": summary["losses"].get("original"),
        "losses": [[point["tokens"], point["loss"]] for point in summary["validation"]],
    }


def kept(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`before` with what `now` names put in its place, each of `now` with where it comes from."""
    names = {row["name"] for row in now}
    return [*(row for row in before if row["name"] not in names), *({**row, **header()} for row in now)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the results file")
    parser.add_argument("--arms", type=Path, nargs="*", default=[], help="folders of reports")
    parser.add_argument("--rounds", type=Path, nargs="*", default=[], help="folders of runs")
    parser.add_argument("--ratios", type=Path, nargs="*", default=[], help="folders of reports over ratios")
    parser.add_argument("--ran", nargs="*", default=[], help="commands that made them")
    options = parser.parse_args()
    path = RESULTS / f"{options.name}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    arms = [arm for report in options.arms for arm in arms_of(report)]
    results = {
        **header(),
        "commands": list(dict.fromkeys([*found.get("commands", []), *options.ran])),
        "arms": kept(found.get("arms", []), arms),
        "rounds": kept(found.get("rounds", []), [round_of(run) for run in options.rounds]),
        "ratios": kept(found.get("ratios", []), [one for report in options.ratios for one in ratios_of(report)]),
    }
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(path)
