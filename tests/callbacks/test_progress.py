"""The bar of a run counts optimizer steps up to its end, over epochs and accumulated batches."""

from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from tests.cli.runs import KEEP_ALL, Project

SMALL = ["--trainer.enable_progress_bar", "true", "--export.enabled", "false", "--trainer.accumulate_grad_batches", "2"]
WATCH = f"--trainer.callbacks+={__name__}.Watch"


class Watch(Callback):
    """Notes what the bar shows: before each batch but the first, and at the end."""

    seen: ClassVar[list[tuple[float, float | None]]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """What the batch before left."""
        bar = trainer.progress_bar_callback
        assert isinstance(bar, RichProgressBar)
        if bar.train_progress_bar_id is not None:
            self.seen.append((bar.train_progress_bar.completed, bar.train_progress_bar.total))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What the last one left."""
        bar = trainer.progress_bar_callback
        assert isinstance(bar, RichProgressBar)
        self.seen.append((bar.train_progress_bar.completed, bar.train_progress_bar.total))


def shown(project: Project, *options: str) -> list[tuple[float, float | None]]:
    """(steps, of how many), each once in a row."""
    Watch.seen.clear()
    project.fit(*SMALL, *options, WATCH)
    return list(dict.fromkeys(Watch.seen))


def test_steps_of_all_epochs(project: Project) -> None:
    options = ["--trainer.max_steps", "-1", "--trainer.max_epochs", "2", "--trainer.limit_train_batches", "5"]
    assert shown(project, *options) == [(step, 6) for step in range(7)]  # three steps an epoch, the last of one batch


def test_tokens_set_the_end(project: Project) -> None:
    options = ["--trainer.max_steps", "-1", "--budget.max_tokens", str(3 * 2 * 2 * 32)]
    assert shown(project, *options) == [(step, 3) for step in range(4)]


def test_a_resumed_run_goes_on_with_it(project: Project) -> None:
    first = project.fit(*SMALL, *KEEP_ALL, "--trainer.val_check_interval", "4")
    assert shown(project, "--ckpt_path", str(first.checkpoint(4)))[-3:] == [(4, 6), (5, 6), (6, 6)]
