"""Training speed: `fit`'s own path beside a loop on plain Transformers, in one process, on the same isolated batches.

    python benchmarks/train.py CASE...        # cases: see CASES; all if none is named
    python benchmarks/train.py --text 'texts/*.jsonl.gz' 7b_2048_8k

`fit` runs as a user runs it, callbacks, logging and protection of small updates on; only reading weights from disk is
replaced, by random ones of the shape named. Batches hold documents of the text, kept apart; `attended` in a row is the
mean length that a token's document has. The share of matrix products is that of a rate measured in the same process.
"""

import argparse
import contextlib
import gc
import json
import os
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from common import append_rows
from plain_loop import MIXTURE, Outcome, plain, reference
from random_llama import SHAPES, random_model, train_tokenizer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import laco_train.training.module as module
import laco_train.training.teacher as teacher
from laco_train.cli import main
from laco_train.settings import DataSettings, OptimizerSettings, ScheduleSettings
from laco_train.training.bf16_adamw import joined, update
from laco_train.training.data import PackedText, collate
from laco_train.training.matmul import matmul_rate
from laco_train.training.optim import learning_rate_factor

ENTRIES = 4000  # of the tokenizer; the models' vocabularies are larger, which costs the same
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Case:
    """A shape, its batches and what is compared.

    Attributes:
        shape: of `random_llama.SHAPES`; config: overrides.
        block, batch, accumulate: `fit`'s; micro: blocks at a time in the plain loop, the most that fit in memory.
        steps: optimizer steps of `fit`; plain_steps: of the plain loop.
        compare: "speed"; "losses": also of each step, without clipping; "reference": those of float32 states too;
            "memory": `fit` alone.
        limit_gib: GPU memory that the process may use; None: all.
        model: overrides of the recipe's model section.
        teacher_layers: of a model of that shape whose distribution both learn from, at half the loss; 0: none.
    """

    shape: str
    block: int
    batch: int
    accumulate: int
    micro: int
    steps: int
    plain_steps: int
    precision: str = "bf16-true"
    compare: str = "speed"
    config: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 5e-5
    log_every: int = 10
    limit_gib: float | None = None
    model: dict[str, Any] = field(default_factory=dict)
    teacher_layers: int = 0


LLAMA_7B = {"num_hidden_layers": 23}
SMOLLM2 = {"num_hidden_layers": 22, "vocab_size": 49_152, "tie_word_embeddings": True}
SMALL = {"num_hidden_layers": 6, "vocab_size": ENTRIES}
EIGHT_BIT = {"optimizer": {"learning_rate": 5e-5, "eight_bit": True}}
CASES = {
    "7b_2048_8k": Case("7b", 2048, 4, 1, 2, 40, 12, config=LLAMA_7B),
    "7b_4096_8k": Case("7b", 4096, 2, 1, 1, 30, 12, config=LLAMA_7B),
    "7b_2048_64k": Case("7b", 2048, 4, 8, 2, 9, 3, config=LLAMA_7B, log_every=2),
    "7b_4096_64k": Case("7b", 4096, 2, 8, 1, 9, 3, config=LLAMA_7B, log_every=2),
    "135m_1024_32k": Case("135m", 1024, 32, 1, 32, 120, 40, "bf16-mixed", config=SMOLLM2, learning_rate=1e-3),
    "135m_distilled": Case(
        "135m",
        1024,
        32,
        1,
        8,
        60,
        12,
        "bf16-mixed",
        config=SMOLLM2,
        learning_rate=1e-3,
        model={"distill": {"logits": MIXTURE}},
        teacher_layers=30,
    ),
    "7b_losses": Case("7b", 2048, 4, 1, 2, 20, 20, compare="reference", config=LLAMA_7B, log_every=1),
    "7b_lora_24gib": Case(
        "7b",
        2048,
        4,
        1,
        2,
        9,
        0,
        compare="memory",
        config=LLAMA_7B,
        log_every=2,
        limit_gib=24,
        model={"method": "lora"},
    ),
    "7b_full_8bit": Case("7b", 2048, 4, 1, 2, 9, 0, compare="memory", config=LLAMA_7B, log_every=2, model=EIGHT_BIT),
    "float32_losses": Case("tiny", 256, 4, 1, 4, 20, 20, "32-true", "losses", SMALL, learning_rate=1e-3, log_every=1),
}


def recipe(case: Case, folder: Path, text: str) -> dict[str, Any]:
    """A recipe of `fit`."""
    blocks = case.batch * case.accumulate * case.steps + 2 * case.batch
    return {
        "seed_everything": 0,
        "model": {
            "source": str(folder / "model"),
            "optimizer": {"learning_rate": case.learning_rate},
            "schedule": {"warmup_steps": 5, "final_ratio": 1.0},
            **case.model,
        },
        "collapse": {"strategy": "none"},
        "data": {
            "train": text,
            "block_size": case.block,
            "batch_size": case.batch,
            "max_tokens": blocks * case.block,
            "validation_max_tokens": 4 * case.block,
            "num_workers": 2 if DEVICE.type == "cuda" else 0,  # as the recipes for a GPU have it
        },
        "trainer": {
            "default_root_dir": str(folder),
            "accelerator": DEVICE.type if DEVICE.type == "cpu" else "gpu",
            "devices": 1,
            "precision": case.precision,
            "max_steps": case.steps,
            "accumulate_grad_batches": case.accumulate,
            "val_check_interval": case.steps * case.accumulate,
            "check_val_every_n_epoch": None,
            "gradient_clip_val": 1.0 if case.compare == "speed" else None,
            "log_every_n_steps": case.log_every,
            "enable_progress_bar": False,
            "enable_checkpointing": False,
        },
        "export": {"enabled": False},
    }


def weights(case: Case, dtype: torch.dtype, *, teaches: bool = False) -> Any:
    """The random model of a case, or the one that it learns from, the same at each call."""
    config = case.config | ({"num_hidden_layers": case.teacher_layers} if teaches else {})
    return random_model(case.shape, DEVICE, torch.bfloat16 if dtype == torch.bfloat16 else torch.float32, **config)


def fitted(case: Case, name: str, folder: Path, text: str) -> tuple[dict[str, Any], list[float]]:
    """summary.json of a fit, and the training losses that it logged."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe(case, folder, text)), encoding="utf-8")
    module.load_model = lambda source, *, dtype, trust_remote_code: weights(case, dtype)
    teacher.load_model = lambda source, *, dtype, trust_remote_code: weights(case, dtype, teaches=True)
    with (folder / f"{name}.log").open("w") as log, contextlib.redirect_stdout(log):
        code = main(["fit", "--recipe", str(path)])
    print((folder / f"{name}.log").read_text(), flush=True)
    assert code == 0, f"fit ended with {code}"
    (run,) = (folder / "lightning_logs" / name).glob("version_*")
    events = EventAccumulator(str(run))
    events.Reload()
    losses = [point.value for point in events.Scalars("train/loss")]
    return json.loads((run / "summary.json").read_text(encoding="utf-8")), losses


def step_batches(case: Case, folder: Path, text: str, tokenizer: Any) -> list[dict[str, Any]]:
    """The blocks of each optimizer step of that fit, in its order."""
    data = PackedText(DataSettings(**recipe(case, folder, text)["data"]), lambda: tokenizer)
    data.setup("fit")
    order, count = list(data.sampler), max(case.steps, case.plain_steps)
    chosen = [order[k : k + case.accumulate] for k in range(0, len(order), case.accumulate)][:count]
    return [collate(data.train_blocks.select([block for batch in step for block in batch])) for step in chosen]


def check_kernel() -> None:
    """The optimizer's kernel beside its plain form: a weight may be rounded otherwise where sums differ in a bit."""
    for exact in (False, True):
        results = []
        for kernel in (fused_update, plain_update):
            generator = torch.Generator(DEVICE).manual_seed(0)
            weight, grad = (
                torch.randn(1_000_003, generator=generator, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)
            )
            states = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq", *(["low"] if exact else []))}
            group = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
            for step in (1.0, 2.0, 3.0):
                scale, found = torch.tensor(2.0, device=DEVICE), torch.tensor(float(step == 2.0), device=DEVICE)
                kernel(weight, grad, states, torch.tensor(step, device=DEVICE), scale, found, group, 7)
            results.append(joined(weight, states["low"].view(torch.int16) if exact else None))
        apart = (results[0] - results[1]).abs()
        print(
            f"kernel, exact {exact}: {float((apart > 0).float().mean()):.1e} differ, at most {float(apart.max()):.1e}"
        )
        assert float((apart > (1e-6 if exact else 0)).float().mean()) < 1e-3 and float(apart.max()) < 0.04


def plain_update(*arguments: Any) -> None:
    """`update` without its kernel."""
    with mock.patch("laco_train.training.bf16_adamw.has_triton", return_value=False):
        update(*arguments)


def free() -> None:
    """Give memory back between models."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def distance(losses: list[float], others: list[float]) -> float:
    """Mean absolute difference of two curves, nats."""
    return statistics.mean(abs(a - b) for a, b in zip(losses, others, strict=False))


def run_case(name: str, case: Case, folder: Path, text: str, tokenizer: Any) -> dict[str, Any]:
    """The row of a case."""
    if case.limit_gib is not None:
        total = torch.cuda.get_device_properties(0).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(case.limit_gib / total)
    summary, losses = fitted(case, name, folder, text)
    if case.limit_gib is not None:
        torch.cuda.set_per_process_memory_fraction(1.0)
    free()
    row: dict[str, Any] = {
        "case": name,
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU",
        "tokens_per_second": summary["tokens_per_second"],
        "matmul_share": summary["mfu"],
        "matmul_tflops": summary["matrix_product_flops"] / 1e12,
        "peak_gib": summary["peak_gib"],
        "flops_per_token": summary["flops_per_token"],
        "tokens_per_step": case.block * case.batch * case.accumulate,
        "block": case.block,
        "steps": case.steps,
        "precision": case.precision,
        "kernels": summary["kernels"],
        "checkpointed_layers": summary["checkpointed_layers"],
        "limit_gib": case.limit_gib,
        "loss_difference": None,
        "plain_loss_difference": None,
    }
    return row if case.compare == "memory" else row | compared(case, summary, losses, folder, text, tokenizer)


def compared(
    case: Case, summary: dict[str, Any], losses: list[float], folder: Path, text: str, tokenizer: Any
) -> dict[str, Any]:
    """What the plain loop adds to a row."""
    steps = step_batches(case, folder, text, tokenizer)
    settings = OptimizerSettings(learning_rate=case.learning_rate)
    schedule = ScheduleSettings(warmup_steps=5, final_ratio=1.0)
    rates = [case.learning_rate * learning_rate_factor(k, case.steps, schedule) for k in range(len(steps))]
    dtype = torch.bfloat16 if case.precision == "bf16-true" else torch.float32
    other: Outcome = plain(
        weights(case, dtype),
        steps[: case.plain_steps],
        rates,
        settings,
        micro=case.micro,
        clip=1.0 if case.compare == "speed" else None,
        autocast=case.precision == "bf16-mixed",
        warmup=min(3, case.plain_steps - 1),
        teacher=weights(case, dtype, teaches=True).eval().requires_grad_(False) if case.teacher_layers else None,
    )
    free()
    rate = matmul_rate(DEVICE, torch.bfloat16 if DEVICE.type == "cuda" else torch.float32)
    row: dict[str, Any] = {
        "matmul_tflops_after": rate / 1e12,
        "plain_tokens_per_second": other.tokens_per_second,
        "plain_matmul_share": other.tokens_per_second * summary["flops_per_token"] / summary["matrix_product_flops"],
        "speedup": summary["tokens_per_second"] / other.tokens_per_second,
        "plain_peak_gib": other.peak_gib,
    }
    if case.compare == "losses":
        row["loss_difference"] = max(abs(a - b) for a, b in zip(losses, other.losses, strict=True))
    if case.compare == "reference":
        exact = reference(weights(case, torch.bfloat16).float(), steps, rates, settings)
        free()
        row |= {"loss_difference": distance(losses, exact), "plain_loss_difference": distance(other.losses, exact)}
        row |= {"losses": losses, "plain_losses": other.losses, "reference_losses": exact}
    return row


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="austen.jsonl.gz", help="as data.train of a recipe")
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}")
    options = parser.parse_args()
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    torch.backends.cuda.matmul.allow_tf32 = False
    if DEVICE.type == "cuda":
        from laco_train.training.bf16_adamw_kernel import fused_update

        check_kernel()
    with tempfile.TemporaryDirectory() as temporary:
        root, vocabulary = Path(temporary), train_tokenizer(ENTRIES)
        for case_name in options.cases or CASES:
            chosen = CASES[case_name]
            space = root / case_name
            vocabulary.save_pretrained(space / "model")
            hidden = SHAPES[chosen.shape]
            shell = random_model("tiny", torch.device("cpu"), num_hidden_layers=1).config
            names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
            for key, value in {**dict(zip(names, hidden, strict=False)), **chosen.config}.items():
                setattr(shell, key, value)
            shell.num_key_value_heads = hidden[-1]
            shell.architectures = ["LlamaForCausalLM"]
            shell.save_pretrained(space / "model")
            print(append_rows("train", [run_case(case_name, chosen, space, options.text, vocabulary)]), flush=True)
