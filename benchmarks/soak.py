"""Kills fits at random moments, goes on with --resume auto, and compares what comes out with an unbroken run.

    python -m benchmarks.soak --kills 100

Each fit is a process of its own, forked from this one, which has imported everything already: an import takes longer
than the tiny model's training. SIGKILL comes at any moment of it: the collapse, a step, a validation, a checkpoint, the
export. Once a run is finished it is compared, and the next one begins, until the kills are used up.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import LlamaConfig, LlamaForCausalLM

import laco_train.cli.trainer  # noqa: F401  # the children find it imported
from benchmarks.common import RESULTS, write_results
from benchmarks.random_llama import train_tokenizer
from laco_train.cli import main as laco_train_main
from laco_train.manifest import MANIFEST

STEPS, BATCHES = 22, 9
"""Optimizer steps of a run, and batches of an epoch with one process."""
RECIPE: dict[str, Any] = {
    "model": {"source": "model", "optimizer": {"learning_rate": 0.01}, "schedule": {"warmup_steps": 2}},
    "collapse": {"layers_per_merge": 2, "similarity_threshold": 0.3, "calibration": ["The river rises.", "Two towns."]},
    "data": {"train": "train.jsonl", "validation": "validation.jsonl", "block_size": 32, "batch_size": 2},
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": STEPS,
        "val_check_interval": 4,
        "check_val_every_n_epoch": None,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "callbacks": [{"class_path": "benchmarks.soak.RecordBatches"}],
    },
}
CONFIGURATIONS: dict[str, tuple[int, dict[str, str]]] = {
    "0 workers": (1, {}),
    "2 workers": (1, {"data.num_workers": "2", "trainer.accumulate_grad_batches": "2", "trainer.max_steps": "11"}),
    "2 DDP ranks": (2, {"trainer.devices": "2", "trainer.strategy": "ddp", "trainer.max_steps": "11"}),
}
"""Processes, and what differs from RECIPE; each run crosses at least one end of an epoch."""
BY_THE_CLOCK = ("seconds", "per_second", "mfu", "product_flops", "peak_gib")
"""Tags and keys whose values no two runs share end so."""


class RecordBatches(Callback):
    """Appends (step, batch, hash of its tokens) to a file of this rank, and makes steps long enough to be hit."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Before the step."""
        digest = hashlib.sha256(batch["input_ids"].numpy().tobytes()).hexdigest()[:16]
        with open(f"batches-{trainer.global_rank}.txt", "a", encoding="utf-8") as file:
            file.write(f"{trainer.global_step} {batch_idx} {digest}\n")
        time.sleep(0.03)


@dataclass
class Outcome:
    """What a finished run left, without what depends on the clock.

    Attributes:
        weights: of its last checkpoint.
        batches: digest by rank, step and batch; of steps done twice the later one.
        curves: points by tag.
        files: content of its other files, by name.
    """

    weights: dict[str, torch.Tensor]
    batches: dict[tuple[str, ...], str]
    curves: dict[str, list[Any]]
    files: dict[str, Any]


def outcome(project: Path) -> Outcome:
    """Read the one run of `project`; what was killed before it had begun left an empty event file, elsewhere."""
    (folder,) = (path.parent for path in project.glob("lightning_logs/soak/*/config.yaml"))
    (checkpoint,) = (folder / "checkpoints").iterdir()
    batches = {}
    for path in project.glob("batches-*.txt"):
        for line in path.read_text(encoding="utf-8").splitlines():
            step, batch, digest = line.split(" ")
            batches[path.name, step, batch] = digest
    named = [*(folder / "export").iterdir(), folder / "collapse_plan.json", folder / "summary.json"]
    files = {str(path.relative_to(folder)): content(path) for path in named}
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    return Outcome(weights, batches, curves(folder), files)


def content(path: Path) -> Any:
    """Bytes of a file, or what a JSON file says, times and rates left out."""

    def untimed(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in pairs if not name.endswith(BY_THE_CLOCK)}

    if path.name == MANIFEST:  # its sums cover those times
        return sorted(json.loads(path.read_text(encoding="utf-8"))["files"])
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=untimed)
    return path.read_bytes()


def curves(folder: Path) -> dict[str, list[Any]]:
    """(step, value) of each point by tag; of memory the steps alone, and no speed, which a resumed step has not."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(e.step, None if tag.endswith(BY_THE_CLOCK) else e.value) for e in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if not tag.endswith(("per_second", "mfu"))
    }


def make_project(root: Path) -> None:
    """A tiny model, text, and the recipe."""
    root.mkdir(parents=True)
    tokenizer = train_tokenizer(300)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4}
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.1, bos_token_id=None, **shape)
    ).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    tokens = BATCHES * 2 * 32 + 16  # of each document a byte is a token, about
    text = "".join(f"River {7 * i} rises in the hills and flows on. " for i in range(100))
    (root / "train.jsonl").write_text(json.dumps({"text": text[: 2 * tokens]}) + "\n", encoding="utf-8")
    held_out = "Held out: two old towns. " * 20
    (root / "validation.jsonl").write_text(json.dumps({"text": held_out}) + "\n", encoding="utf-8")
    (root / "soak.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")


def start(project: Path, arguments: Sequence[str], ranks: int) -> list[int]:
    """Fork a fit of `ranks` processes in `project`; returns their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    sys.stdout.flush()
    for rank in range(ranks):
        if pid := os.fork():
            started.append(pid)
            continue
        code = 70
        try:
            code = _child(project, arguments, rank, ranks, port)
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return started


def _child(project: Path, arguments: Sequence[str], rank: int, ranks: int, port: int) -> int:
    os.chdir(project)
    log = os.open(f"output-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if ranks > 1:  # as a launcher would start them: Lightning's own runs the command line again, with all imports
        place = {"LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
        os.environ.update({name: str(value) for name, value in {**place, "MASTER_PORT": port}.items()})
    return laco_train_main(["fit", "--recipe", "soak.yaml", *arguments])


def trained(project: Path) -> int:
    """Bytes that say which batches rank 0 trained on."""
    path = project / "batches-0.txt"
    return path.stat().st_size if path.exists() else 0


def until_trained(pids: list[int], project: Path) -> float:
    """Wait until a fit just started trains, or ends; seconds that it took."""
    began, before = time.monotonic(), trained(project)
    while trained(project) == before and not finished(pids, 0):
        time.sleep(0.005)
    return time.monotonic() - began


def finished(pids: list[int], seconds: float | None = None) -> bool:
    """Wait for processes, for so many seconds; whether all ended, and well.

    Raises:
        RuntimeError: one ended with an exit code of its own.
    """
    until = None if seconds is None else time.monotonic() + seconds
    while pids:
        for pid in list(pids):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                pids.remove(pid)
                if os.waitstatus_to_exitcode(status):
                    raise RuntimeError(f"a fit ended with {os.waitstatus_to_exitcode(status)}")
        if until is not None and time.monotonic() > until:
            break
        time.sleep(0.005)
    return not pids


def kill(pids: list[int], moments: random.Random) -> None:
    """SIGKILL all, in any order and up to half a second apart: what is left may hang, or die of it."""
    moments.shuffle(pids)
    for i, pid in enumerate(pids):
        if i:
            time.sleep(moments.choice((0.0, 0.5)))
        os.kill(pid, signal.SIGKILL)
    for pid in pids:
        os.waitpid(pid, 0)


@dataclass
class Row:
    """What the kills of one configuration showed."""

    configuration: str
    kills: int = 0
    resumes: int = 0
    runs: int = 0
    equal_weights: bool = True
    equal_order: bool = True
    equal_losses: bool = True
    equal_files: bool = True
    moments: list[float] = field(default_factory=list)

    def compare(self, whole: Outcome, broken: Outcome) -> None:
        """Note what differs."""
        self.runs += 1
        names = whole.weights.keys()
        same = names == broken.weights.keys() and all(torch.equal(whole.weights[n], broken.weights[n]) for n in names)
        self.equal_weights &= same
        self.equal_order &= whole.batches == broken.batches
        self.equal_losses &= whole.curves == broken.curves
        self.equal_files &= whole.files == broken.files
        for one, other in ((whole.curves, broken.curves), (whole.files, broken.files)):
            for name in one.keys() | other.keys():
                if one.get(name) != other.get(name):
                    print(f"{name}\n  unbroken {one.get(name)!s:.500}\n  broken   {other.get(name)!s:.500}", flush=True)


def soak(name: str, kills: int, root: Path, seed: int) -> Row:
    """Kill runs of a configuration `kills` times in all."""
    ranks, changes = CONFIGURATIONS[name]
    arguments = [word for key, value in changes.items() for word in (f"--{key}", value)]
    project = root / name.replace(" ", "_")
    shutil.copytree(root / "project", project)
    pids, began = start(project, arguments, ranks), time.monotonic()
    opening = until_trained(pids, project)
    assert finished(pids)
    seconds = time.monotonic() - began
    whole, row, moments = outcome(project), Row(name), random.Random(f"{seed} {name}")
    while row.kills < kills:
        begin_anew(project)
        first = True
        while True:
            row.resumes += not first
            pids = start(project, [*arguments, "--resume", "auto"], ranks)
            first = False
            if row.kills < kills:
                # one in four at any moment, the others from the first step on
                anywhere = moments.random() < 0.25
                moment = moments.uniform(0, seconds if anywhere else seconds - opening)
                waited = 0.0 if anywhere else until_trained(pids, project)
                if not finished(pids, moment):
                    kill(pids, moments)
                    row.kills += 1
                    row.moments.append(round(waited + moment, 2))
                    continue
            elif not finished(pids):
                continue
            break
        row.compare(whole, outcome(project))
        print(f"{name}: {row.kills} kills of a fit of {seconds:.1f} s, {row.runs} runs compared", flush=True)
    return row


def begin_anew(project: Path) -> None:
    """Remove what runs left."""
    shutil.rmtree(project / "lightning_logs")
    for path in (*project.glob("batches-*.txt"), *project.glob("output-*.txt")):
        path.unlink()


def main() -> None:
    """Soak every configuration."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="in all, spread over the configurations")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of soak.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    output = options.output.resolve()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        os.environ["LACO_TRAIN_CACHE"] = str(root / "cache")
        make_project(root / "project")
        names = list(CONFIGURATIONS)
        shares = [len(range(i, options.kills, len(names))) for i in range(len(names))]
        rows = [soak(name, kills, root, options.seed) for name, kills in zip(names, shares, strict=True)]
    path = write_results("soak", [vars(row) for row in rows], output)
    print(path)
    if not all(r.equal_weights and r.equal_order and r.equal_losses and r.equal_files for r in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
