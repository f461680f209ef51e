"""Every way to collapse at equal depth and equal tokens, with plain next-token loss and with the same distillation.

    python benchmarks/quality.py --data.train 'texts/*.jsonl.gz' --data.validation held_out.jsonl.gz \\
        --work /tmp/quality --gpus 0,1,2,3                  # all of it; the same command goes on after a break
    python benchmarks/quality.py ... --objectives plain --depths 22 --arms best,sleb,original

Arms are those of the study (issue 8): its runs, its sweep of the learning rate on documents that are not reported, its
data order. `best` is collapse and refinement of smollm2_135m_best.yaml; what it refines on comes off its budget.
`optipfair` removes the layers that OptiPFair 0.4.2 (pip install --no-deps optipfair==0.4.2) ranks lowest on the same
calibration text. In `distilled`, all arms learn from the original trained on, whose run of `plain` is made first.
Each arm takes the learning rate that its sweep at 22 layers with plain loss chose. A row is appended for each run once
it is there, and what has its rows is not run again; the original is, on every kind of machine. At 22 layers with plain
loss parts of `best` run too: `together` refines without windows, `windows` refines them alone, on a sixteenth.
"""

import argparse
import itertools
import json
import os
import queue
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from common import RESULTS, header

from laco_train.recipes import find_recipe

ARMS = ("original", "best", "laco", "shortgpt", "sleb", "angular", "tail", "streamline", "greedy", "optipfair")
PARTS: dict[str, dict[str, Any]] = {"together": {"windows": 0.0}, "windows": {"tokens": 65_536, "windows": 1.0}}
ORIGINAL = 30  # its layers
DEPTHS, OBJECTIVES = (22, 25, 15), ("plain", "distilled")
RATES = [1.0e-3, 2.0e-3, 3.0e-3]
SWEPT = ("plain", 22)  # whose learning rates serve for the other depths and objectives
DISTILLED = 0.5  # share of the loss that is the divergence from the teacher
SWEEP = 0.3  # share of the budget that each learning rate is tried for
RESULTS_FILE = RESULTS / "quality.json"
KEY = ("strategy", "depth", "seed", "objective")  # and the machine, of the original


@dataclass(frozen=True)
class Quality:
    """What is asked for: options of the command line."""

    work: Path
    shared: tuple[str, ...]
    seeds: tuple[int, ...]
    rates: tuple[float, ...]

    def name(self, objective: str, depth: int) -> str:
        """Of a study."""
        return f"quality_{objective}_{depth}"

    def folder(self, objective: str, depth: int) -> Path:
        """Of that study."""
        return self.work / "lightning_logs" / self.name(objective, depth)

    def recipe(self, objective: str, depth: int, arms: tuple[str, ...]) -> Path:
        """The study's recipe, written to the work folder; the same whenever it is asked for."""
        recipe: dict[str, Any] = yaml.safe_load(find_recipe("smollm2_135m_study.yaml").read_text(encoding="utf-8"))
        best = yaml.safe_load(find_recipe("smollm2_135m_best.yaml").read_text(encoding="utf-8"))["collapse"]
        best["target_depth"] = depth
        own: dict[str, Any] = {arm: {} for arm in arms if runs_at(arm, objective, depth)}
        if "best" in own:
            own["best"] = {"collapse": best}
        for part in PARTS.keys() & own.keys():
            own[part] = {"collapse": best | {"refine": best["refine"] | PARTS[part]}}
        if "optipfair" in own:
            own["optipfair"] = {"collapse": {"remove": optipfair(recipe, depth, self.work)}}
        if "laco" in own and depth < 16:  # two layers a merge leave 16 at least, unless merged ones merge again
            own["laco"] = {"collapse": {"min_interval": 1}}
        swept = (objective, depth) == SWEPT
        for arm in own:
            rate = self.rate(arm)
            if rate is not None:  # an arm that names its rate is not swept
                own[arm] = own[arm] | {"model": {"optimizer": {"learning_rate": rate}}}
            elif not swept:
                sys.exit(f"{arm} has no learning rate yet: run --objectives {SWEPT[0]} --depths {SWEPT[1]} first")
        recipe["study"] |= {"arms": own, "seeds": list(self.seeds), "sweep_share": SWEEP}
        recipe["study"]["learning_rates"] = list(self.rates) if swept else []
        recipe["collapse"]["target_depth"] = depth
        recipe["budget"] = {"max_tokens": 10_000_000, "evaluate_at": [0.1, 0.5, 1.0]}
        recipe["export"]["enabled"] = False
        recipe["data"]["batch_size"] = 32
        recipe["trainer"] |= {
            "enable_checkpointing": False,
            "accumulate_grad_batches": 1,
            "val_check_interval": 1000,
            "default_root_dir": str(self.work),
        }
        if objective == "distilled":
            recipe["model"]["distill"] |= {"logits": DISTILLED, "teacher": str(self.teacher)}
        path = self.work / f"{self.name(objective, depth)}.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        return path

    def rate(self, arm: str) -> float | None:
        """Learning rate of `arm` in the results of `SWEPT`, maybe of another day; None: it was not run."""
        objective, depth = SWEPT
        for row in kept_rows():
            if (row["strategy"], row["objective"]) == (arm, objective) and row["depth"] in (depth, ORIGINAL):
                found: float = row["learning_rate"]
                return found
        return None

    @property
    def teacher(self) -> Path:
        """The original trained on, exported."""
        return self.work / "teacher"


def optipfair(recipe: dict[str, Any], depth: int, work: Path) -> list[int]:
    """The layers that OptiPFair would remove: those it ranks as least important on the calibration text."""
    kept = work / f"optipfair_{depth}.json"
    if kept.exists():
        found: list[int] = json.loads(kept.read_text())
        return found
    import torch
    from optipfair.pruning.depth import analyze_layer_importance
    from torch.utils.data import DataLoader

    from laco_train.collapse.similarity import read_calibration
    from laco_train.models import load_model, load_tokenizer

    source = recipe["model"]["source"]
    tokenizer = load_tokenizer(source)
    model = load_model(source, dtype=torch.float32, trust_remote_code=False)
    rows = [tokenizer(text, return_tensors="pt") for text in read_calibration(recipe["collapse"]["calibration"])]
    samples: Any = [{name: row[name][0] for name in row} for row in rows]
    batches: Any = DataLoader(samples, batch_size=1)
    scores = analyze_layer_importance(model, batches, show_progress=False)
    removed = sorted(sorted(scores, key=lambda layer: scores[layer])[: len(scores) - depth])
    kept.write_text(json.dumps(removed))
    return removed


def run(quality: Quality, arm: str, recipe: Path, gpu: str) -> bool:
    """All seeds of an arm, on one GPU; whether they ended well."""
    command = [sys.executable, "-m", "laco_train", "study", "--recipe", str(recipe), "--arms", arm, *quality.shared]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
    # threads of several processes that wait for each other on the same cores take minutes for seconds
    environment.setdefault("OMP_NUM_THREADS", "6")
    log = quality.work / f"{recipe.stem}-{arm}.log"
    with log.open("a", encoding="utf-8") as output:
        code = subprocess.run(command, stdout=output, stderr=output, env=environment, check=False).returncode
    print(f"{recipe.stem} {arm}: {'done' if code == 0 else f'ended with {code}, see {log}'}", flush=True)
    return code == 0


def rows_of(quality: Quality, objective: str, depth: int, arm: str) -> list[dict[str, Any]]:
    """A row for each finished seed of an arm."""
    rows = []
    for seed in quality.seeds:
        folder = quality.folder(objective, depth) / f"{arm}-seed{seed}" / "version_0"
        if not (folder / "summary.json").exists():
            continue
        s = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        plan = json.loads((folder / "collapse_plan.json").read_text(encoding="utf-8"))
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        fitted = plan["refined"] or {"tokens": 0, "seconds": 0.0}
        rows.append(
            {
                "strategy": arm,
                "depth": s["depth"],
                "seed": seed,
                "objective": objective,
                "learning_rate": config["model"]["optimizer"]["learning_rate"],
                "refine_tokens": fitted["tokens"],
                "refine_seconds": fitted["seconds"],
                "collapse_seconds": s["search_seconds"] + fitted["seconds"],
                "flops_per_token": s["flops_per_token"],
                "original": s["losses"].get("original"),
                "losses": [[point["tokens"], point["loss"]] for point in s["validation"]],
            }
        )
    return rows


def append(rows: list[dict[str, Any]]) -> None:
    """Add `rows` to quality.json, each with a header, in place of earlier ones of the same run."""
    now = [{**row, **header()} for row in rows]
    fresh = set(map(key_of, now))
    found = {**header(), "rows": [*(row for row in kept_rows() if key_of(row) not in fresh), *now]}
    RESULTS_FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What no two rows share."""
    return (*(row[name] for name in KEY), row["machine"] if row["strategy"] == "original" else None)


def kept_rows() -> list[dict[str, Any]]:
    """Rows of earlier runs."""
    if not RESULTS_FILE.exists():
        return []
    rows: list[dict[str, Any]] = json.loads(RESULTS_FILE.read_text(encoding="utf-8"))["rows"]
    return rows


def export_teacher(quality: Quality, gpu: str) -> None:
    """Train the original on as the plain study does, and export it, unless that was done."""
    if quality.teacher.exists():
        return
    recipe = quality.recipe(*SWEPT, ("original",)).rename(quality.work / "quality_teacher.yaml")
    options = ["--export.enabled=true", f"--study.learning_rates=[{quality.rate('original')}]"]
    made_by = Quality(quality.work, (*quality.shared, *options), (0,), quality.rates)
    if not run(made_by, "original", recipe, gpu):
        sys.exit("the teacher was not trained")
    made = quality.work / "lightning_logs" / "quality_teacher" / "original-seed0" / "version_0" / "export"
    made.rename(quality.teacher)


def main() -> None:
    """Run what is asked for, each arm on the next free GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for runs")
    parser.add_argument("--gpus", default="0", help="numbers of the GPUs; one that is named twice runs two at once")
    parser.add_argument("--depths", default=",".join(map(str, DEPTHS)))
    parser.add_argument("--objectives", default=",".join(OBJECTIVES))
    parser.add_argument("--arms", default=",".join((*ARMS, *PARTS)))
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--rates", default=",".join(map(str, RATES)), help="learning rates to choose from")
    options, shared = parser.parse_known_args()
    options.work.mkdir(parents=True, exist_ok=True)
    arms, gpus = tuple(options.arms.split(",")), options.gpus.split(",")
    seeds, rates = tuple(map(int, options.seeds.split(","))), tuple(map(float, options.rates.split(",")))
    quality = Quality(options.work.resolve(), tuple(shared), seeds, rates)
    objectives, depths = options.objectives.split(","), list(map(int, options.depths.split(",")))
    every = sorted(itertools.product(objectives, depths), key=lambda study: study != SWEPT)  # rates first
    for together in ([one for one in every if one == SWEPT], [one for one in every if one != SWEPT]):
        if any(objective == "distilled" for objective, _ in together):
            export_teacher(quality, gpus[0])
        runs = [(*study, arm) for study in together for arm in arms if is_left(quality, *study, arm)]
        work_off(quality, runs, arms, gpus)


def runs_at(arm: str, objective: str, depth: int) -> bool:
    """Whether an arm is asked for there: one run of the original stands beside all depths, parts of best at one."""
    if arm in PARTS:
        return (objective, depth) == SWEPT
    return arm != "original" or depth == SWEPT[1]


def is_left(quality: Quality, objective: str, depth: int, arm: str) -> bool:
    """Whether a row of an arm is missing."""
    if not runs_at(arm, objective, depth):
        return False
    left = ORIGINAL if arm == "original" else depth
    wanted = [dict(zip(KEY, (arm, left, seed, objective), strict=True)) for seed in quality.seeds]
    there = set(map(key_of, kept_rows()))
    return not all(key_of(row | {"machine": header()["machine"]}) in there for row in wanted)


def work_off(quality: Quality, runs: list[tuple[str, int, str]], arms: tuple[str, ...], gpus: list[str]) -> None:
    """Make `runs`, (objective, depth, arm) each, on whichever of `gpus` is free."""
    recipes = {study: quality.recipe(*study, arms) for study in dict.fromkeys(run[:2] for run in runs)}
    waiting: queue.SimpleQueue[tuple[str, int, str]] = queue.SimpleQueue()
    for one in runs:
        waiting.put(one)
    writing = threading.Lock()

    def work(gpu: str) -> None:
        while True:
            try:
                objective, depth, arm = waiting.get_nowait()
            except queue.Empty:
                return
            run(quality, arm, recipes[objective, depth], gpu)
            with writing:
                append(rows_of(quality, objective, depth, arm))

    workers = [threading.Thread(target=work, args=(gpu,)) for gpu in gpus]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


if __name__ == "__main__":
    main()
