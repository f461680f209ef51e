"""Run folders that no training made, with losses like those of SmolLM2-135M, for reports to be made of."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from laco_train.study.tasks import run_name

BUDGET, STEP = 9_830_400, 32_768
SHA = "a" * 64
# start, after 50 steps, after 300 steps, depth, learning rate
ARMS = {
    "original": (3.538, 2.797, 2.575, 30, 1e-3),
    "laco": (6.760, 3.590, 3.052, 22, 3e-4),
    "shortgpt": (4.869, 3.255, 2.910, 22, 3e-4),
    "sleb": (4.609, 3.069, 2.759, 22, 1e-3),
    "angular": (5.214, 3.301, 2.934, 22, 3e-4),
    "tail": (7.902, 3.842, 3.201, 22, 3e-4),
    "streamline": (4.046, 3.045, 2.762, 22, 1e-3),
    "greedy": (6.121, 3.466, 2.998, 22, 3e-4),
    "scratch": (10.94, 7.25, 5.05, 22, 6e-4),
}
DEPTHS = {0.1: 26, 0.2: 22, 0.27: 20, 0.4: 15, 0.5: 11}
SPEED = {30: 130_000, 26: 150_000, 22: 170_000, 20: 180_000, 15: 230_000, 14: 240_000, 11: 300_000}
PARAMETERS = {depth: 134_515_008 - 3_539_520 * (30 - depth) for depth in SPEED}


def evaluations(steps: int) -> list[int]:
    """Steps to evaluate after: dense at first, then every 25."""
    return sorted({0, 1, 2, 3, 5, 8, 12, 15, 20, *range(25, steps, 25), 30, steps})


def losses(start: float, middle: float, end: float, steps: int, wiggle: float = 0.0) -> list[tuple[int, float]]:
    """(step, loss): a power law in steps through three losses, at 0, a sixth and all of `steps`, and seeded noise."""
    at = steps / 6
    floor, drop = end - 0.25 * (middle - end), start - (end - 0.25 * (middle - end))
    power = math.log((middle - floor) / (end - floor)) / math.log(steps / at)
    shift = at / ((drop / (middle - floor)) ** (1 / power) - 1)
    return [
        (n, floor + drop * (1 + n / shift) ** -power + wiggle * math.sin(12.9 * n + 100 * wiggle))
        for n in evaluations(steps)
    ]


def summary(
    curve: Iterable[tuple[int, float]],
    *,
    strategy: str = "laco",
    depth: int = 22,
    timed: bool = True,
    sha: str | None = SHA,
) -> dict[str, Any]:
    """summary.json of a run with `curve`."""
    points = [
        {"step": n, "tokens": n * STEP, "loss": loss} | ({"seconds": n * STEP / SPEED[depth]} if timed else {})
        for n, loss in curve
    ]
    return {
        "source": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "strategy": strategy,
        "source_depth": 30,
        "depth": depth,
        "parameters": {"before": PARAMETERS[30], "after": PARAMETERS[depth], "ratio": 0.2},
        "losses": {"original": 3.538, "collapsed": points[0]["loss"], "trained": points[-1]["loss"]},
        "validation": points,
        "tokens": points[-1]["tokens"],
        "tokens_per_second": SPEED[depth],
        "flops_per_token": 6.0 * PARAMETERS[depth],
        **({} if sha is None else {"data": {"validation": {"sha256": sha}}}),
    }


def accuracies(task: str, values: Iterable[tuple[int, float]], questions: int = 400, sha: str = "q") -> list[Any]:
    """Entries of `evaluation` in summary.json: accuracies on a task of two choices after so many steps."""
    return [
        {
            "step": n,
            "tokens": n * STEP,
            "task": task,
            "metric": "acc",
            "value": value,
            "error": math.sqrt(value * (1 - value) / questions),
            "questions": questions,
            "questions_sha256": sha,
            "chance": 0.5,
            "data": "made up",
        }
        for n, value in values
    ]


def samples(name: str) -> dict[str, list[str]]:
    """`samples` in summary.json of two prompts."""
    texts = {moment: [f"{name} {moment} says {i} " + 12 * "word " for i in "ab"] for moment in ("collapsed", "trained")}
    return {"prompts": ["The river", "Once | upon"], "original": ["into the sea.", "a\ntime <b>."], **texts}


def write_run(
    folder: Path, values: dict[str, Any], learning_rate: float = 3e-4, seed: int = 0, *, scratch: bool = False
) -> Path:
    """A run folder with these values as its summary."""
    folder.mkdir(parents=True, exist_ok=True)
    model = {"optimizer": {"learning_rate": learning_rate}, "from_scratch": scratch}
    config = {"seed_everything": seed, "model": model, "data": {"seed": seed}}
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "collapse": {"strategy": values["strategy"]}}))
    (folder / "summary.json").write_text(json.dumps(values))
    return folder


def write_study(
    root: Path, seeds: Sequence[int] = (0,), *, rounds: bool = False, steps: int = 300, evaluated: bool = False
) -> Path:
    """A study of nine arms, and one more in two rounds if asked; with accuracies and samples if `evaluated`."""
    for arm, (start, middle, end, depth, rate) in ARMS.items():
        for seed in seeds:
            curve = losses(start, middle, end, steps, 0.02 * (1 + seed) if len(seeds) > 1 else 0.0)
            strategy = {"original": "none", "scratch": "laco"}.get(arm, arm)
            values, place = summary(curve, strategy=strategy, depth=depth), root / f"{arm}-seed{seed}/version_0"
            if evaluated:
                right = [(0, 0.9 - start / 20), (steps // 2, 0.95 - middle / 10 + seed / 50), (steps, 1 - end / 9)]
                values["evaluation"] = [*accuracies("piqa", right), *accuracies("boolq", right[::2], 100)]
                values["samples"] = samples(arm)
            write_run(place, values, rate, seed, scratch=arm == "scratch")
    if rounds:
        write_rounds(root / "rounds-seed0/version_0", steps // 2)
    return root


def write_rounds(run: Path, steps: int = 30, *, second_rate: float = 3e-4, seed: int = 0) -> Path:
    """A run in two rounds of so many steps, to 22 and to 15 layers."""
    write_run(run / "round_1", summary(losses(6.76, 3.6, 3.2, steps)), seed=seed)
    second = write_run(run / "round_2", summary(losses(7.9, 4.3, 3.9, steps), depth=15), second_rate, seed)
    config = yaml.safe_load((second / "config.yaml").read_text())
    config["model"]["source"] = str(run / "round_1" / "export")
    (second / "config.yaml").write_text(yaml.safe_dump(config))
    return run


def write_ratios(
    root: Path, *, seeds: Sequence[int] = (0,), trained: bool = True, scratch: bool = True, original: bool = True
) -> Path:
    """A study over pruning ratios, which cost the more the larger they are."""
    steps = 30 if trained else 0
    for arm, (start, middle, end, _, rate) in ARMS.items():
        if (arm == "scratch" and not scratch) or (arm == "original" and not original):
            continue
        strategy = {"original": "none", "scratch": "laco"}.get(arm, arm)
        places: dict[float | None, int] = {None: 30} if arm == "original" else {**DEPTHS}
        for ratio, depth in places.items():
            worse = 1.0 if ratio is None or arm == "scratch" else (ratio / 0.2) ** 1.5
            begin, finish = (
                least + worse * (loss - least) for least, loss in ((3.538, start), (2.5, (middle + end) / 2))
            )
            for seed in seeds:
                shift = 0.04 * (seed - 0.5) if len(seeds) > 1 else 0.0
                curve = [(0, begin + shift), *([(steps, finish + shift)] if trained else [])]
                values = summary(curve, strategy=strategy, depth=depth)
                place = root / run_name(arm, seed, ratio) / "version_0"
                write_run(place, values, rate, seed, scratch=arm == "scratch")
    return root


if __name__ == "__main__":
    import sys

    from laco_train.study.report import write_report

    evaluated = write_study(Path(sys.argv[1]) / "evaluated", (0, 1), evaluated=True)
    print(write_report(evaluated, speed=False))
    for name, seeds, rounds in (("one", (0,), False), ("seeds", (0, 1, 2), False), ("rounds", (0,), True)):
        print(write_report(write_study(Path(sys.argv[1]) / name, seeds, rounds=rounds), speed=False))
    for name, seeds, trained in (("ratios", (0,), True), ("ratio_seeds", (0, 1), True), ("untrained", (0,), False)):
        study = write_ratios(Path(sys.argv[1]) / name, seeds=seeds, trained=trained, scratch=trained)
        print(write_report(study, speed=False))
