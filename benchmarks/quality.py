"""Every way to collapse at equal depth and equal tokens, with plain next-token loss and with the same distillation.

    python benchmarks/quality.py --data.train 'texts/*.jsonl.gz' --data.validation held_out.jsonl.gz \\
        --work /tmp/quality --gpus 0,1,2,3                  # all of it; the same command goes on after a break
    python benchmarks/quality.py ... --objectives plain --depths 22 --arms best,sleb,original

Arms are those of the study (issue 8): its runs, its sweep of the learning rate on documents that are not reported, its
data order. `best` is collapse and refinement of smollm2_135m_best.yaml, at other depths than 22 with the strategy that
the recipe names for them; what it refines on comes off its budget.
`optipfair` removes the layers that OptiPFair 0.4.2 (pip install --no-deps optipfair==0.4.2) ranks lowest on the same
calibration text; where they are those of shortgpt, and so is the rate, its run is shortgpt's (`same_as`). In
`distilled`, all arms learn from the original trained on: its run with plain loss and the first seed. Each arm takes the
learning rate that its sweep at 22 layers with plain loss chose, over the whole budget. Each arm, depth, objective and
seed is a study of its own; its row is appended once it is there, and what has its row is not run again; the original
is, on every kind of machine. At 22 layers parts of `best` run too; those that collapse or refine otherwise take its
learning rate. So do, at other depths, other choices of layers, refined alike: `one_block`, the recipe's for 22 layers,
and `sleb_refined`.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from common import RESULTS, header, name_files

from laco_train.files import write_whole
from laco_train.recipes import find_recipe

ARMS = ("original", "best", "laco", "shortgpt", "sleb", "angular", "tail", "streamline", "greedy", "optipfair")
PARTS: dict[str, dict[str, Any]] = {
    "together": {"collapse": {"refine": {"windows": 0.0}}},
    "windows": {"collapse": {"refine": {"tokens": 65_536, "windows": 1.0}}},
    "million": {"collapse": {"refine": {"tokens": 1_000_000, "windows": 0.065}}},
    "disjoint": {"collapse": {"strategy": "laco", "remove": [3, 5, 12, 13, 14, 16, 17, 18], "target_depth": None}},
    "lora": {"model": {"method": "lora", "lora": {"rank": 64, "alpha": 128}}},
    "last_layers": {"model": {"method": "last_layers", "last_layers": 6}},
}
"""What of `best` is otherwise.

Its windows or its divergence left out, three times as many tokens, the windows that dynamic programming finds cheapest
(windows.json), less trained.
"""
BEST_ELSEWHERE = "shortgpt"  # strategy of best at other depths than that of SWEPT, by the comment in its recipe
ELSEWHERE = {"one_block": "angular", "sleb_refined": "sleb"}  # `best` from another strategy, at the other depths
RATED_AS_BEST = ("together", "windows", "million", "disjoint", *ELSEWHERE)  # not swept
ORIGINAL = 30  # its layers
DEPTHS, OBJECTIVES = (22, 25, 15), ("plain", "distilled")
RATES = [1.0e-3, 2.0e-3, 3.0e-3]
SWEPT = ("plain", 22)  # whose learning rates serve for the other depths and objectives
DISTILLED = 0.5  # share of the loss that is the divergence from the teacher
SWEEP = 1.0  # share of the budget that each learning rate is tried for: with 0.3 of it lower rates win that lose later
RESULTS_FILE = RESULTS / "quality.json"
RANKING = threading.Lock()  # for optipfair, whose ranking of a depth is kept
KEY = ("strategy", "depth", "seed", "objective")  # and the machine, of the original


@dataclass(frozen=True)
class Job:
    """A run: a study of one arm and one seed.

    Attributes:
        objective: one of OBJECTIVES.
        depth: layers left of a collapsed arm; the original runs beside those of SWEPT.
        arm: one of ARMS, PARTS or ELSEWHERE.
        seed: of the data's order and every random number.
    """

    objective: str
    depth: int
    arm: str
    seed: int

    @property
    def name(self) -> str:
        """Of the study."""
        return f"quality_{self.objective}_{self.depth}_{self.arm}_{self.seed}"

    @property
    def key(self) -> tuple[Any, ...]:
        """What its row has under KEY."""
        return self.arm, ORIGINAL if self.arm == "original" else self.depth, self.seed, self.objective

    @property
    def twin(self) -> "Job":
        """Of OptiPFair's: the run of the strategy that may remove the same layers."""
        return replace(self, arm="shortgpt")

    @property
    def is_made(self) -> bool:
        """Whether its arm runs at its depth."""
        if self.arm in PARTS:
            return self.depth == SWEPT[1]
        return self.arm not in ELSEWHERE or self.depth != SWEPT[1]

    @property
    def is_swept(self) -> bool:
        """Whether it is of the study that may choose a learning rate."""
        return (self.objective, self.depth) == SWEPT


@dataclass(frozen=True)
class Quality:
    """What is asked for: options of the command line."""

    work: Path
    shared: tuple[str, ...]
    seeds: tuple[int, ...]
    rates: tuple[float, ...]

    def folder(self, job: Job) -> Path:
        """Of its run."""
        return self.work / "lightning_logs" / job.name / f"{job.arm}-seed{job.seed}" / "version_0"

    @property
    def teaching(self) -> Job:
        """The run whose model teaches."""
        return Job(*SWEPT, "original", self.seeds[0])

    @property
    def teacher(self) -> Path:
        """The original trained on, exported."""
        return self.folder(self.teaching) / "export"

    @property
    def teacher_loss(self) -> float:
        """Its last loss."""
        summary = json.loads((self.teacher.parent / "summary.json").read_text(encoding="utf-8"))
        found: float = summary["validation"][-1]["loss"]
        return found

    def is_ready(self, job: Job) -> bool:
        """Whether its learning rate is known, or it is the one that chooses it; and whether its teacher is there."""
        if job.objective == "distilled" and not self.teacher.exists():
            return False
        if job.arm == "optipfair" and of_run(job.twin) is None:
            return False
        return (self.chooses(job) and job.arm not in RATED_AS_BEST) or chosen_rate(job.arm) is not None

    def chooses(self, job: Job) -> bool:
        """Whether it is of the study, and has the seed, that learning rates are chosen in."""
        return job.is_swept and job.seed == self.seeds[0]

    def recipe(self, job: Job) -> Path:
        """The study's recipe, written to the work folder."""
        recipe, own, rate = read_recipe("study"), self.changes(job), chosen_rate(job.arm)
        if rate is not None:  # an arm that names its rate is not swept
            own = overlaid(own, {"model": {"optimizer": {"learning_rate": rate}}})
        recipe["study"] |= {"arms": {job.arm: own}, "seeds": [job.seed], "sweep_share": SWEEP}
        recipe["study"]["learning_rates"] = list(self.rates) if rate is None else []
        recipe["collapse"]["target_depth"] = job.depth
        recipe["budget"] = {"max_tokens": 10_000_000, "evaluate_at": [0.1, 0.5, 1.0]}
        recipe["export"]["enabled"] = job == self.teaching
        recipe["data"]["batch_size"] = 32
        recipe["trainer"] |= {
            "enable_checkpointing": False,
            "accumulate_grad_batches": 1,
            "val_check_interval": 1000,
            "default_root_dir": str(self.work),
        }
        if job.objective == "distilled":
            recipe["model"]["distill"] |= {"logits": DISTILLED, "teacher": str(self.teacher)}
        path = self.work / f"{job.name}.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        return path

    def changes(self, job: Job) -> dict[str, Any]:
        """What the arm changes in the study's recipe."""
        if job.arm in ("best", *ELSEWHERE, *PARTS):
            best = read_recipe("best")["collapse"] | {"target_depth": job.depth}
            if job.arm == "best" and job.depth != SWEPT[1]:
                best["strategy"] = BEST_ELSEWHERE
            best["strategy"] = ELSEWHERE.get(job.arm, best["strategy"])
            return overlaid({"collapse": best}, PARTS.get(job.arm, {}))
        if job.arm == "optipfair":
            return {"collapse": {"remove": optipfair(job.depth, self.work).removed}}
        if job.arm == "laco" and job.depth < 16:  # two layers a merge leave 16 at least, unless merged ones merge again
            return {"collapse": {"min_interval": 1}}
        return {}


def read_recipe(name: str) -> dict[str, Any]:
    """A recipe of SmolLM2-135M."""
    recipe: dict[str, Any] = yaml.safe_load(find_recipe(f"smollm2_135m_{name}.yaml").read_text(encoding="utf-8"))
    return recipe


def overlaid(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` in its place, section by section."""
    both = {key: overlaid(base[key], changes[key]) for key in base.keys() & changes if isinstance(changes[key], dict)}
    return {**base, **changes, **both}


def chosen_rate(arm: str) -> float | None:
    """Learning rate of `arm` in the results of `SWEPT`, maybe of another day; None: it was not run."""
    arm = "best" if arm in RATED_AS_BEST else arm
    for row in kept_rows():
        if (row["strategy"], row["objective"]) == (arm, SWEPT[0]) and row["depth"] in (SWEPT[1], ORIGINAL):
            found: float = row["learning_rate"]
            return found
    return None


@dataclass(frozen=True)
class Ranking:
    """What OptiPFair of that version would remove: layers from 0."""

    version: str
    removed: list[int]


def optipfair(depth: int, work: Path) -> Ranking:
    """The layers that it ranks as least important on the calibration text."""
    kept = work / f"optipfair_ranking_{depth}.json"
    with RANKING:
        if not kept.exists():
            found = Ranking(importlib.metadata.version("optipfair"), ranked_lowest(depth))
            write_whole(kept, json.dumps(asdict(found)))
    return Ranking(**json.loads(kept.read_text()))


def ranked_lowest(depth: int) -> list[int]:
    """What OptiPFair itself says."""
    import torch
    from optipfair.pruning.depth import analyze_layer_importance
    from torch.utils.data import DataLoader

    from laco_train.collapse.similarity import read_calibration
    from laco_train.models import load_model, load_tokenizer

    recipe = read_recipe("study")
    source = recipe["model"]["source"]
    tokenizer = load_tokenizer(source)
    model = load_model(source, dtype=torch.float32, trust_remote_code=False)
    rows = [tokenizer(text, return_tensors="pt") for text in read_calibration(recipe["collapse"]["calibration"])]
    samples: Any = [{name: row[name][0] for name in row} for row in rows]
    batches: Any = DataLoader(samples, batch_size=1)
    scores = analyze_layer_importance(model, batches, show_progress=False)
    return sorted(sorted(scores, key=lambda layer: scores[layer])[: len(scores) - depth])


def run(quality: Quality, job: Job, gpu: str) -> None:
    """Make a run on one GPU.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, "-m", "laco_train", "study", "--recipe", str(quality.recipe(job)), *quality.shared]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
    # threads of several processes that wait for each other on the same cores take minutes for seconds
    environment.setdefault("OMP_NUM_THREADS", "4")
    log = quality.work / f"{job.name}.log"
    with log.open("a", encoding="utf-8") as output:
        code = subprocess.run(command, stdout=output, stderr=output, env=environment, check=False).returncode
    if code:
        raise RuntimeError(f"ended with {code}, see {log}")


def row_of(quality: Quality, job: Job) -> dict[str, Any]:
    """What its run gave."""
    folder = quality.folder(job)
    s = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    plan = json.loads((folder / "collapse_plan.json").read_text(encoding="utf-8"))
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    fitted = plan["refined"] or {"tokens": 0, "seconds": 0.0}  # by a strategy, in its own time, or by collapse.refine
    refined = fitted["seconds"] if plan["settings"]["refine"]["tokens"] else 0.0
    return {
        **dict(zip(KEY, job.key, strict=True)),
        "depth": s["depth"],
        "removed": plan["removed"],  # layers of the original, from 0; none where they were merged
        "learning_rate": config["model"]["optimizer"]["learning_rate"],
        "sweep_share": SWEEP,
        "sweep": tried_rates(quality, job),
        "refine_tokens": fitted["tokens"],
        "refine_seconds": fitted["seconds"],
        "collapse_seconds": None if job.arm == "optipfair" else s["search_seconds"] + refined,  # its own is not timed
        "peer_version": optipfair(job.depth, quality.work).version if job.arm == "optipfair" else None,
        "flops_per_token": s["flops_per_token"],
        "original": s["losses"].get("original"),
        "train_sha256": s["data"]["train"]["sha256"],
        "validation_sha256": s["data"]["validation"]["sha256"],
        "teacher_loss": quality.teacher_loss if job.objective == "distilled" else None,
        "losses": [[point["tokens"], point["loss"]] for point in s["validation"]],
    }


def tried_rates(quality: Quality, job: Job) -> list[list[float]]:
    """Learning rates that the run chose from, each with the last loss on documents that are not reported."""
    rates = []
    for summary in (quality.work / "lightning_logs" / f"{job.name}-sweep").glob(f"{job.arm}-*/version_0/summary.json"):
        config = yaml.safe_load(summary.with_name("config.yaml").read_text(encoding="utf-8"))
        found = json.loads(summary.read_text(encoding="utf-8"))
        rates.append([config["model"]["optimizer"]["learning_rate"], found["validation"][-1]["loss"]])
    return sorted(rates)


def same_as_twin(quality: Quality, job: Job) -> dict[str, Any] | None:
    """The row of OptiPFair's run, if shortgpt's removed the same layers; its own search is not timed."""
    twin = of_run(job.twin) if job.arm == "optipfair" else None
    if twin is None or twin["removed"] != (ranking := optipfair(job.depth, quality.work)).removed:
        return None
    if chosen_rate(job.arm) not in (None, twin["learning_rate"]):  # they differ at the depth that chose
        return None
    others = {"strategy": job.arm, "collapse_seconds": None, "peer_version": ranking.version}
    return {**twin, **others, "same_as": twin["strategy"]}


def of_run(job: Job) -> dict[str, Any] | None:
    """Its row among `kept_rows`, on whatever machine."""
    return next((row for row in kept_rows() if tuple(row[name] for name in KEY) == job.key), None)


def append(row: dict[str, Any]) -> None:
    """Add `row` to quality.json, with a header unless it is of another run, in place of an earlier one of its key.

    A run made again, as the teacher is where its weights are gone, was not swept: it keeps what the earlier one tried.
    """
    now, others = {**header(), **row}, []
    for kept in all_rows():
        if key_of(kept) != key_of(now):
            others.append(kept)
        elif not now["sweep"] and kept["sweep_share"] == SWEEP:
            now["sweep"] = kept["sweep"]
    found = {**header(), "rows": [*others, now]}
    write_whole(RESULTS_FILE, json.dumps(found, indent=1) + "\n")  # others read it meanwhile


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What no two rows share."""
    return (*(row[name] for name in KEY), row["machine"] if row["strategy"] == "original" else None)


def all_rows() -> list[dict[str, Any]]:
    """Rows of earlier runs."""
    if not RESULTS_FILE.exists():
        return []
    rows: list[dict[str, Any]] = json.loads(RESULTS_FILE.read_text(encoding="utf-8"))["rows"]
    return rows


def kept_rows() -> list[dict[str, Any]]:
    """Those whose learning rate was sought as it is now."""
    return [row for row in all_rows() if row["sweep_share"] == SWEEP]


def jobs_left(
    quality: Quality, arms: tuple[str, ...], depths: tuple[int, ...], objectives: tuple[str, ...]
) -> list[Job]:
    """Runs without a row, in the order to make them: those that choose a rate, 22 layers before others, by seed."""
    every = [Job(*of) for of in itertools.product(objectives, depths, arms, quality.seeds)]
    every = [job for job in every if job.arm != "original" and job.is_made]
    # it has all its layers whatever the depths
    originals = itertools.product(objectives, quality.seeds if "original" in arms else ())
    every += [Job(objective, SWEPT[1], "original", seed) for objective, seed in originals]
    there, machine = set(map(key_of, kept_rows())), header()["machine"]
    left = [job for job in every if (*job.key, machine if job.arm == "original" else None) not in there]
    twins = {job.twin for job in left if job.arm == "optipfair"}
    left += [job for job in twins if job not in left and of_run(job) is None]
    taught = any(job.objective == "distilled" for job in left)
    if taught and not quality.teacher.exists() and quality.teaching not in left:
        left.append(quality.teaching)
    return sorted(
        left,
        key=lambda job: (
            not quality.chooses(job),
            job != quality.teaching,  # others wait for it, and it takes longest
            job.depth != SWEPT[1],
            quality.seeds.index(job.seed),
            OBJECTIVES.index(job.objective),
        ),
    )


def main() -> None:
    """Run what is asked for, each run on the next free GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for runs")
    parser.add_argument("--gpus", default="0", help="numbers of the GPUs; one that is named twice runs two at once")
    parser.add_argument("--depths", default=",".join(map(str, DEPTHS)), help="parts of best run at 22 alone")
    parser.add_argument("--objectives", default=",".join(OBJECTIVES))
    parser.add_argument("--arms", default=",".join((*ARMS, *PARTS, *ELSEWHERE)))
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--rates", default=",".join(map(str, RATES)), help="learning rates to choose from")
    options, shared = parser.parse_known_args()
    options.work.mkdir(parents=True, exist_ok=True)
    name_files()
    seeds, rates = tuple(map(int, options.seeds.split(","))), tuple(map(float, options.rates.split(",")))
    quality = Quality(options.work.resolve(), tuple(shared), seeds, rates)
    asked = (tuple(options.arms.split(",")), tuple(map(int, options.depths.split(","))))
    jobs = jobs_left(quality, *asked, tuple(options.objectives.split(",")))
    failed, left = work_off(quality, jobs, options.gpus.split(","))
    if left:
        print("not run, as learning rate, teacher or twin is missing: " + ", ".join(job.name for job in left))
    sys.exit(1 if failed or left else 0)


def work_off(quality: Quality, waiting: list[Job], gpus: list[str]) -> tuple[list[Job], list[Job]]:
    """Make the runs `waiting`, each on whichever of `gpus` is free once it is ready.

    Returns:
        Those that failed, and those that were never ready.
    """
    changed, running, failed = threading.Condition(), list[Job](), list[Job]()

    def next_job() -> Job | None:
        while True:
            ready = next((job for job in waiting if quality.is_ready(job)), None)
            if ready is not None:
                waiting.remove(ready)
                running.append(ready)
                return ready
            if not waiting or not running:  # what is left waits for a run that failed
                return None
            changed.wait()

    def work(gpu: str) -> None:
        while True:
            with changed:
                job = next_job()
            if job is None:
                return
            try:
                row = same_as_twin(quality, job)
                if row is None:
                    run(quality, job, gpu)
                    row = row_of(quality, job)
                with changed:
                    append(row)
                print(f"{job.name}: done", flush=True)
            except Exception as error:  # the others go on
                failed.append(job)
                print(f"{job.name}: {type(error).__name__}: {error}", flush=True)
            finally:
                with changed:
                    running.remove(job)
                    changed.notify_all()

    workers = [threading.Thread(target=work, args=(gpu,)) for gpu in gpus]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            worker.join()
    except KeyboardInterrupt:
        with changed:
            waiting.clear()  # else the next would begin
        raise
    return failed, waiting


if __name__ == "__main__":
    main()
