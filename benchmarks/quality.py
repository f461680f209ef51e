"""Every way to collapse at equal depth and equal tokens, with plain next-token loss and with the same distillation.

    python benchmarks/quality.py --data.train 'texts/*.jsonl.gz' --data.validation held_out.jsonl.gz \\
        --work /tmp/quality --gpus 0,1,2,3                  # all of it; the same command goes on after a break
    python benchmarks/quality.py ... --objectives plain --depths 22 --arms best,sleb,original

Arms are those of the study (issue 8): its runs, its sweep of the learning rate on documents that are not reported, its
data order. `best` is collapse and refinement of smollm2_135m_best.yaml; what it refines on comes off its budget.
`optipfair` removes the layers that OptiPFair 0.4.2 (pip install --no-deps optipfair==0.4.2) ranks lowest on the same
calibration text. In `distilled`, all arms learn from the original trained on, whose run of `plain` is made first.
A row is appended for each run once it is there.
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
DEPTHS, OBJECTIVES = (22, 25, 15), ("plain", "distilled")
RATES = [5.0e-4, 1.0e-3, 2.0e-3]
DISTILLED = 0.5  # share of the loss that is the divergence from the teacher
KEY = ("strategy", "depth", "seed", "objective")


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
        own: dict[str, Any] = {arm: {} for arm in arms}
        if "best" in own:
            best["target_depth"] = depth
            own["best"] = {"collapse": best}
        if "optipfair" in own:
            own["optipfair"] = {"collapse": {"remove": optipfair(recipe, depth, self.work)}}
        if "laco" in own and depth < 16:  # two layers a merge leave 16 at least
            own["laco"] = {"collapse": {"layers_per_merge": 3}}
        recipe["study"] |= {"arms": own, "seeds": list(self.seeds), "learning_rates": list(self.rates)}
        recipe["collapse"]["target_depth"] = depth
        recipe["budget"] = {"max_tokens": 10_000_000, "evaluate_at": [0.1, 0.5, 1.0]}
        recipe["export"]["enabled"] = False
        recipe["trainer"] |= {
            "enable_checkpointing": False,
            "val_check_interval": 1000,
            "default_root_dir": str(self.work),
        }
        if objective == "distilled":
            recipe["model"]["distill"] |= {"logits": DISTILLED, "teacher": str(self.teacher)}
        path = self.work / f"{self.name(objective, depth)}.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        return path

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
    path = RESULTS / "quality.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {**header(), "rows": []}
    fresh = {tuple(row[key] for key in KEY) for row in rows}
    kept = [row for row in found["rows"] if tuple(row[key] for key in KEY) not in fresh]
    found["rows"] = [*kept, *({**row, **header()} for row in rows)]
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def export_teacher(quality: Quality, gpu: str) -> None:
    """Train the original on as the plain study does, and export it, unless that was done."""
    if quality.teacher.exists():
        return
    recipe = quality.recipe("plain", DEPTHS[0], ("original",)).rename(quality.work / "quality_teacher.yaml")
    options = ["--study.seeds=[0]", "--export.enabled=true", "--trainer.enable_checkpointing=false"]
    made_by = Quality(quality.work, (*quality.shared, *options), (0,), quality.rates)
    if not run(made_by, "original", recipe, gpu):
        sys.exit("the teacher was not trained")
    made = quality.work / "lightning_logs" / "quality_teacher" / "original-seed0" / "version_0" / "export"
    made.rename(quality.teacher)


def main() -> None:
    """Run what is asked for, each arm on the next free GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for runs")
    parser.add_argument("--gpus", default="0", help="numbers of the GPUs to use")
    parser.add_argument("--depths", default=",".join(map(str, DEPTHS)))
    parser.add_argument("--objectives", default=",".join(OBJECTIVES))
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--rates", default=",".join(map(str, RATES)), help="learning rates to choose from")
    options, shared = parser.parse_known_args()
    options.work.mkdir(parents=True, exist_ok=True)
    arms, gpus = tuple(options.arms.split(",")), options.gpus.split(",")
    seeds, rates = tuple(map(int, options.seeds.split(","))), tuple(map(float, options.rates.split(",")))
    quality = Quality(options.work.resolve(), tuple(shared), seeds, rates)
    objectives, depths = options.objectives.split(","), list(map(int, options.depths.split(",")))
    if "distilled" in objectives:
        export_teacher(quality, gpus[0])
    waiting: queue.SimpleQueue[tuple[str, int, str, Path]] = queue.SimpleQueue()
    for objective, depth in itertools.product(objectives, depths):
        recipe = quality.recipe(objective, depth, arms)
        for arm in arms:
            waiting.put((objective, depth, arm, recipe))
    writing = threading.Lock()

    def work(gpu: str) -> None:
        while True:
            try:
                objective, depth, arm, recipe = waiting.get_nowait()
            except queue.Empty:
                return
            run(quality, arm, recipe, gpu)
            with writing:
                append(rows_of(quality, objective, depth, arm))

    workers = [threading.Thread(target=work, args=(gpu,)) for gpu in gpus]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


if __name__ == "__main__":
    main()
