"""benchmarks/quality.py writes studies that the program takes, with every arm at the depth that is asked for."""

import contextlib
import io
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from laco_train.cli.study import checked, parser

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))  # its scripts import each other by name

import quality as quality_benchmark  # noqa: E402
from quality import (  # noqa: E402
    ARMS,
    BEST_ELSEWHERE,
    ELSEWHERE,
    KEY,
    OBJECTIVES,
    PARTS,
    RATED_AS_BEST,
    SWEEP,
    SWEPT,
    Job,
    Quality,
    all_rows,
    append,
    jobs_left,
    same_as_twin,
    tried_rates,
    work_off,
)


def row(arm: str, depth: int, seed: int = 0, machine: str = "a card", share: float = SWEEP) -> dict[str, Any]:
    """Of a run with plain loss."""
    named = {"strategy": arm, "depth": depth, "seed": seed, "objective": "plain"}
    return {**named, "learning_rate": 0.002, "sweep_share": share, "sweep": [], "machine": machine}


def rank(work: Path, depth: int, removed: list[int]) -> None:
    """As if OptiPFair 0.1 had ranked layers."""
    (work / f"optipfair_ranking_{depth}.json").write_text(json.dumps({"version": "0.1", "removed": removed}))


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A results file that is not there yet."""
    monkeypatch.setattr(quality_benchmark, "RESULTS_FILE", tmp_path / "quality.json")
    return tmp_path / "quality.json"


@pytest.fixture
def quality(tmp_path: Path) -> Quality:
    """Two seeds, two rates."""
    return Quality(tmp_path, (), (0, 1), (5e-4, 1e-3))


def test_what_has_its_row_is_not_run_again(results: Path, quality: Quality) -> None:
    rows = [row("sleb", 22, 0), row("sleb", 22, 1), row("angular", 22, 0), row("tail", 22, 0, share=0.3)]
    rows += [row("original", 30, seed, "another card") for seed in (0, 1)]
    results.write_text(json.dumps({"rows": rows}))
    left = jobs_left(quality, ("sleb", "angular", "tail", "original"), (22, 25), ("plain",))
    assert {(job.arm, job.depth, job.seed) for job in left} == {
        ("angular", 22, 1),
        *((arm, 25, seed) for arm in ("sleb", "angular", "tail") for seed in (0, 1)),
        *(("tail", 22, seed) for seed in (0, 1)),  # its rate was sought otherwise
        *(("original", 22, seed) for seed in (0, 1)),  # on another card
    }
    append(row("tail", 22, 0))
    assert len(all_rows()) == 6 and all_rows()[-1]["sweep_share"] == SWEEP


def test_a_run_made_again_keeps_the_rates_that_were_tried(results: Path) -> None:
    append(row("original", 30) | {"sweep": [[0.001, 2.6], [0.002, 2.7]]})
    append(row("original", 30) | {"losses": [[0, 3.0]]})
    (again,) = all_rows()
    assert again["losses"] == [[0, 3.0]] and again["sweep"] == [[0.001, 2.6], [0.002, 2.7]]


def test_all_runs_and_their_order(results: Path, quality: Quality) -> None:
    left = jobs_left(quality, (*ARMS, *PARTS, *ELSEWHERE), (22, 25, 15), OBJECTIVES)
    assert len(left) == len(set(left)) == 2 * 2 * (3 * (len(ARMS) - 1) + 1 + len(PARTS) + 2 * len(ELSEWHERE))
    elsewhere = {(job.objective, job.depth) for job in left if job.arm in ELSEWHERE}
    assert elsewhere == set(itertools.product(OBJECTIVES, (25, 15)))
    choosing = len(ARMS) + len(PARTS)
    assert left[0] == quality.teaching and all(map(quality.chooses, left[:choosing]))
    groups = [(job.depth != 22, job.seed, job.objective) for job in left[choosing:]]
    assert groups == sorted(groups, key=lambda group: (*group[:2], group[2] != "plain"))


def cheapest_windows() -> list[int]:
    """Layers that the choice by dynamic programming of windows.json removes: of each window all but the first."""
    rows = json.loads((ROOT / "benchmarks/results/windows.json").read_text())["rows"]
    (chosen,) = (row["windows"].split(",") for row in rows if row["choice"] == "cheapest")
    windows = [map(int, window.split("-")) for window in chosen]
    return [layer for first, last in windows for layer in range(first + 1, last + 1)]


@pytest.mark.parametrize(("objective", "depth"), [("plain", 22), ("distilled", 22), ("plain", 15), ("distilled", 25)])
def test_its_studies_are_valid(objective: str, depth: int, tmp_path: Path, results: Path, quality: Quality) -> None:
    swept = (objective, depth) == SWEPT
    known = ("shortgpt", "best") if swept else (*ARMS, *PARTS)  # what optipfair and parts of best wait for
    rows = [row(arm, 30 if arm == "original" else 22) for arm in known]
    rows.append(row("shortgpt", depth) | {"objective": objective})
    results.write_text(json.dumps({"rows": rows}))
    rank(tmp_path, depth, list(range(30 - depth)))  # else it needs the weights
    quality.teacher.mkdir(parents=True)
    jobs = [Job(objective, depth, arm, 0) for arm in (*ARMS, *(PARTS if depth == 22 else ELSEWHERE))]
    recipes = {}
    for job in jobs:
        assert quality.is_ready(job)
        with contextlib.chdir(tmp_path), contextlib.redirect_stdout(io.StringIO()):
            config = parser().parse_args(["--recipe", str(quality.recipe(job))])
            study, arms = checked(config, job.name, parser())
        assert arms == [job.arm]
        (task,) = study.tasks(arms)
        sweeps = swept and job.arm not in (*known, *RATED_AS_BEST)
        recipes[job.arm] = recipe = study.recipe(task, 1e-3 if sweeps else None)
        collapse = recipe["collapse"]
        left = 30 - len(collapse["remove"]) if collapse["remove"] else collapse["target_depth"] or 30
        assert left == (30 if job.arm == "original" else depth)
        assert recipe["budget"]["max_tokens"] == 10_000_000
        assert recipe["export"]["enabled"] == (job == quality.teaching)
        assert study.settings.sweeps == sweeps
        assert sweeps or study.rate(job.arm) == (0.002, "arm")
        assert recipe["model"]["distill"]["logits"] == (0.5 if objective == "distilled" else 0.0)
    refine = {arm: recipe["collapse"]["refine"] for arm, recipe in recipes.items()}
    assert refine["best"]["tokens"] > 0 and refine["best"]["windows"] > 0
    assert refine["angular"]["tokens"] == 0
    chosen = {arm: recipe["collapse"]["strategy"] for arm, recipe in recipes.items()}
    assert chosen["best"] == ("angular" if depth == 22 else "shortgpt")
    if depth != 22:
        assert (chosen["one_block"], chosen["sleb_refined"]) == ("angular", "sleb")
        assert refine["one_block"] == refine["sleb_refined"] == refine["best"]
    else:
        assert refine["disjoint"] == refine["best"]
        assert recipes["disjoint"]["collapse"]["remove"] == cheapest_windows()
        assert refine["windows"] == refine["best"] | {"tokens": 65_536, "windows": 1.0}
        assert refine["together"] == refine["best"] | {"windows": 0.0}


def test_a_part_keeps_what_it_is_with_the_rate_that_was_chosen(results: Path, quality: Quality) -> None:
    results.write_text(json.dumps({"rows": [row("lora", 22)]}))
    recipe = yaml.safe_load(quality.recipe(Job(*SWEPT, "lora", 1)).read_text())
    own = recipe["study"]["arms"]["lora"]
    assert own["model"] == {"method": "lora", "lora": own["model"]["lora"], "optimizer": {"learning_rate": 0.002}}
    assert own["collapse"]["refine"]["tokens"] > 0 and recipe["study"]["learning_rates"] == []


@pytest.mark.parametrize("same", [True, False])
def test_optipfair_is_shortgpt_where_it_removes_the_same_layers(
    same: bool, results: Path, quality: Quality, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    monkeypatch.setattr(quality_benchmark, "run", lambda _, job, __: made.append(job.arm))
    monkeypatch.setattr(
        quality_benchmark,
        "row_of",
        lambda _, job: row(job.arm, job.depth, job.seed) | {"removed": [3, 4], "collapse_seconds": 1.0},
    )
    rank(tmp_path, 22, [3, 4] if same else [3, 5])
    asked = jobs_left(quality, ("optipfair", "shortgpt"), (22,), ("plain",))
    assert work_off(quality, asked, ["0", "0", "1"]) == ([], [])
    assert made.count("optipfair") == (0 if same else 2) and made.count("shortgpt") == 2
    rows = [found for found in all_rows() if found["strategy"] == "optipfair"]
    assert [(found.get("same_as"), found["collapse_seconds"]) for found in rows] == [
        ("shortgpt", None) if same else (None, 1.0)
    ] * 2
    assert {found["machine"] for found in all_rows()} == {"a card"}  # where the run was made, wherever it is copied


def test_optipfair_brings_its_twin(results: Path, quality: Quality) -> None:
    left = jobs_left(quality, ("optipfair",), (22,), ("plain",))
    assert {(job.arm, job.seed) for job in left} == {
        (arm, seed) for arm in ("optipfair", "shortgpt") for seed in (0, 1)
    }
    results.write_text(json.dumps({"rows": [row("shortgpt", 22, 0), row("shortgpt", 22, 1)]}))
    assert {job.arm for job in jobs_left(quality, ("optipfair",), (22,), ("plain",))} == {"optipfair"}


def test_optipfair_of_another_rate_is_run_itself(results: Path, quality: Quality, tmp_path: Path) -> None:
    rank(tmp_path, 25, [3, 4])
    twin = row("shortgpt", 25) | {"removed": [3, 4]}
    job = Job("plain", 25, "optipfair", 0)
    for rate, same in ((0.002, True), (0.001, False)):
        results.write_text(json.dumps({"rows": [twin, row("optipfair", 22) | {"learning_rate": rate}]}))
        copied = same_as_twin(quality, job)
        assert (copied and copied["peer_version"]) == ("0.1" if same else None)


def test_the_recipe_is_what_the_results_chose() -> None:
    """`best` of quality.json at the recipe's depth is the recipe, and its rate the best of those tried."""
    rows = json.loads((ROOT / "benchmarks/results/quality.json").read_text())["rows"]
    text = (ROOT / "recipes/smollm2_135m_best.yaml").read_text()
    recipe = yaml.safe_load(text)
    collapse, rate = recipe["collapse"], recipe["model"]["optimizer"]["learning_rate"]
    plain = [row for row in rows if row["objective"] == "plain" and row["depth"] == collapse["target_depth"]]
    by_arm = {arm: [row for row in plain if row["strategy"] == arm] for arm in ("best", collapse["strategy"])}
    assert {tuple(row["removed"]) for found in by_arm.values() for row in found} == {tuple(range(2, 10))}
    for row in by_arm["best"]:
        assert row["learning_rate"] == rate
        assert 0 <= collapse["refine"]["tokens"] - row["refine_tokens"] < collapse["refine"]["batch_size"] * 1024
    sweep = next(row["sweep"] for row in by_arm["best"] if row["sweep"])
    assert min(sweep, key=lambda tried: tried[1])[0] == rate
    assert ELSEWHERE["one_block"] == collapse["strategy"]
    assert BEST_ELSEWHERE in next(line for line in text.splitlines() if line.startswith("  strategy:"))


def test_rates_that_were_tried(quality: Quality) -> None:
    """One that diverged has no summary, and the study goes on without it."""
    job = Job(*SWEPT, "sleb", 0)
    for rate, loss in ((0.002, 2.5), (0.001, 2.75), (0.003, None)):
        folder = quality.work / "lightning_logs" / f"{job.name}-sweep" / f"sleb-{rate}" / "version_0"
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"optimizer": {"learning_rate": rate}}}))
        if loss is not None:
            (folder / "summary.json").write_text(json.dumps({"validation": [{"loss": 9.0}, {"loss": loss}]}))
    assert tried_rates(quality, job) == [[0.001, 2.75], [0.002, 2.5]]


def test_runs_wait_for_rate_and_teacher(
    results: Path, quality: Quality, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several at once; what waits for a run that failed is told, and the rest is made."""
    made: list[Job] = []

    def run(quality: Quality, job: Job, gpu: str) -> None:
        made.append(job)
        if job.arm == "sleb":
            raise RuntimeError("no room")
        if job == quality.teaching:
            quality.teacher.mkdir(parents=True)

    def row_of(quality: Quality, job: Job) -> dict[str, Any]:
        named = dict(zip(KEY, job.key, strict=True))
        return {**named, "learning_rate": 0.001, "sweep_share": SWEEP}

    monkeypatch.setattr(quality_benchmark, "run", run)
    monkeypatch.setattr(quality_benchmark, "row_of", row_of)
    asked = jobs_left(quality, ("sleb", "tail", "original"), (22, 25), OBJECTIVES)
    failed, left = work_off(quality, list(asked), ["0", "1", "1"])
    assert sorted(map(str, [*made, *left])) == sorted(map(str, asked))
    assert {job.arm for job in left} == {"sleb"} and len(left) == 7
    assert failed == [Job(*SWEPT, "sleb", 0)]
    assert min(made.index(job) for job in made if job.objective == "distilled") > made.index(quality.teaching)
    first = made.index(Job(*SWEPT, "tail", 0))
    assert first < min(made.index(job) for job in made if job.arm == "tail" and job != made[first])
    assert jobs_left(quality, ("tail", "original"), (22, 25), OBJECTIVES) == []
    elsewhere = Quality(tmp_path / "other", (), (0, 1), (1e-3,))  # no teacher there, and nobody to teach
    assert jobs_left(elsewhere, ("tail", "original"), (22, 25), OBJECTIVES) == []


def test_what_is_no_run_is_no_end(results: Path, quality: Quality, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that can't be made leaves no other worker waiting."""
    monkeypatch.setattr(quality_benchmark, "run", lambda *_: None)
    asked = jobs_left(quality, ("tail", "sleb"), (22,), ("plain",))
    failed, left = work_off(quality, list(asked), ["0", "1"])  # no summary.json
    assert {job.seed for job in failed} == {0} and {job.seed for job in left} == {1}


def test_the_original_has_all_its_layers_at_any_depth(results: Path, quality: Quality) -> None:
    left = jobs_left(quality, ("original",), (25,), ("plain",))
    assert [job.key for job in left] == [("original", 30, seed, "plain") for seed in (0, 1)]
