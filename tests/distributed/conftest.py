"""Runs of two processes on a tiny model, started as a user does; runs are shared, as imports cost most."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import destroy_process_group, init_process_group
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.cli.runs import KEEP_ALL, Project, Result, Run, environment, make_project

STRATEGY = "lightning.pytorch.strategies.ModelParallelStrategy"
SIZES = ["--trainer.strategy.data_parallel_size=2", "--trainer.strategy.tensor_parallel_size=1"]
DDP = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.val_check_interval=1"]
FSDP2 = ["--trainer.devices=2", f"--trainer.strategy={STRATEGY}", *SIZES, "--trainer.val_check_interval=1"]
ONE_FILE = "--trainer.strategy.save_distributed_checkpoint=false"
# an even number of validation blocks, so that two ranks leave none out
DATA = ["--data.validation_max_tokens=320"]
# one process that takes the same optimizer steps as two
ALONE = ["--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=2"]
LAUNCHER = [sys.executable, "-m", "laco_train"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "laco_train"]
SECONDS = 180


@dataclass(frozen=True)
class Ranks:
    """A project, and the program called in processes of its own."""

    project: Project

    def __call__(self, *arguments: str, launcher: list[str] = LAUNCHER) -> Result:
        """Run the program; all its processes are gone afterwards, whatever happens."""
        process = subprocess.Popen(
            [*launcher, *arguments],
            cwd=self.project.root,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=SECONDS)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        return Result(process.returncode, out, err)

    def fit(self, *arguments: str, launcher: list[str] = LAUNCHER) -> Run:
        """A fit that succeeds, all checkpoints kept."""
        before = set(self.versions())
        result = self("fit", "--recipe", "tiny.yaml", *DATA, *KEEP_ALL, *arguments, launcher=launcher)
        assert result.code == 0, result.err
        (folder,) = set(self.versions()) - before
        return Run(folder, result)

    def alone(self, *arguments: str) -> Run:
        """A fit in this process that takes the steps of two ranks."""
        before = set(self.versions())
        result = self.project("fit", "--recipe", "tiny.yaml", *DATA, *KEEP_ALL, *ALONE, *arguments)
        assert result.code == 0, result.err
        (folder,) = set(self.versions()) - before
        return Run(folder, result)

    def versions(self) -> list[Path]:
        """Folders of runs."""
        return list(self.project.root.glob("lightning_logs/tiny/version_*"))


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    destroy_process_group()


@pytest.fixture(scope="session")
def ranks(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> Ranks:
    """A project that all tests here share."""
    return Ranks(make_project(tmp_path_factory.mktemp("project"), tiny_llama(), tiny_tokenizer))


@pytest.fixture(scope="session")
def fsdp2(ranks: Ranks) -> Run:
    """Two sharded ranks that torchrun started, checkpoints in shards."""
    return ranks.fit(*FSDP2, launcher=TORCHRUN)


def losses(run: Run) -> list[Any]:
    """(step, tokens, loss) of each validation."""
    return [(point["step"], point["tokens"], point["loss"]) for point in run.summary()["validation"]]
