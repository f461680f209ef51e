"""Measures accuracies on tasks at chosen shares of a run's tokens."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from transformers import PreTrainedTokenizerBase

from laco_train.callbacks.checkpoints import last_checkpoint
from laco_train.callbacks.curves import Curves
from laco_train.callbacks.divergence import diverged
from laco_train.callbacks.evaluate_at import ends_step
from laco_train.errors import InputError, TrainingStopped
from laco_train.evaluation.harness import TaskRow, evaluate
from laco_train.evaluation.record import Accuracy, accuracy_of
from laco_train.settings import EvaluationSettings
from laco_train.training.layers import called_plainly
from laco_train.training.loggers import log_to_all
from laco_train.training.loss import Batch
from laco_train.training.module import CausalLM


class EvaluateTasks(Callback):
    """Measures once evaluation.at says so, and keeps each accuracy; no step of training is another for it.

    Every rank answers every question: a sharded model needs all ranks in each pass, and none waits long for another.

    Args:
        settings: the recipe's evaluation section.
        tasks: its tasks with their questions.
        tokenizer: gives one that the harness may change.
        curves: counts tokens and time; it must come before this among the Trainer's callbacks.

    Attributes:
        found: accuracies so far, task by task, by rising tokens.
    """

    def __init__(
        self,
        settings: EvaluationSettings,
        tasks: Sequence[TaskRow],
        tokenizer: Callable[[], PreTrainedTokenizerBase],
        curves: Curves,
    ):
        self.settings = settings
        self.tasks = tasks
        self.tokenizer = tokenizer
        self.curves = curves
        self.found: list[Accuracy] = []
        self._steps: set[int] = set()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The length of the run is known; measure the collapsed model if 0 is asked for."""
        assert isinstance(pl_module, CausalLM)
        self._steps = pl_module.steps_at([share for share in self.settings.at if share > 0])
        if 0 in self.settings.at and trainer.global_step == 0 and not self.found:
            self._measure(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Measure after the last batch of such a step."""
        assert isinstance(pl_module, CausalLM)
        if ends_step(trainer, self._steps):
            self._measure(trainer, pl_module)

    def _measure(self, trainer: Trainer, module: CausalLM) -> None:
        self.curves.pause(trainer)
        gpu = trainer.strategy.root_device.type == "cuda"
        size, limit = self.settings.batch_size, self.settings.limit
        if trainer.is_global_zero:
            print(f"Answering {', '.join(task.name for task in self.tasks)}", flush=True)
        try:
            with isolate_rng(include_cuda=gpu), called_plainly(module.lm):
                tokenizer = self.tokenizer()
                scores = evaluate(module.lm, tokenizer, self.tasks, batch_size=size, limit=limit, bars=False)
        except InputError:
            raise diverged(trainer, "a log-likelihood on a task was no number") from None
        except torch.OutOfMemoryError as error:
            reason, saved = str(error).splitlines()[0], last_checkpoint(trainer)
            raise TrainingStopped(
                f"out of memory on the tasks ({reason}); last good checkpoint: {saved}; lower evaluation.batch_size"
            ) from error
        if gpu:
            torch.cuda.empty_cache()  # what the questions took, in other sizes than training's
        found = [accuracy_of(score, trainer.global_step, self.curves.tokens) for score in scores]
        self.found += found
        values = {f"accuracy/{one.task}": one.value for one in found}
        log_to_all(trainer, values, trainer.global_step)
        self.curves.by_tokens(trainer, values)
        if trainer.is_global_zero:
            each = ", ".join(f"{one.task} {one.value:.3f}" for one in found)
            print(f"Accuracy after {self.curves.tokens:,} tokens: {each}", flush=True)

    def state_dict(self) -> dict[str, Any]:
        """The accuracies, so that a resumed run goes on with them."""
        return {"found": [asdict(one) for one in self.found]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See state_dict."""
        self.found = [Accuracy(**values) for values in state_dict["found"]]
