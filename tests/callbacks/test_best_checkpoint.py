"""The best and the newest checkpoint are kept, on resume too."""

from pathlib import Path

import pytest
import torch

from tests.cli.runs import Project
from tests.cli.test_resume_auto import Stopped, at
from tests.study.studies import forget_stop

OPTIONS = [
    *("--trainer.callbacks+=laco_train.callbacks.best_checkpoint.BestAndNewestCheckpoint", "--trainer.max_steps=12"),
    *("--model.optimizer.learning_rate=0.3", "--model.schedule.warmup_steps=12", "--export.enabled=false"),
]
"""A rate that rises until the loss does."""


def steps(folder: Path) -> list[int]:
    paths = folder.glob("checkpoints/*.ckpt")
    return sorted(torch.load(path, weights_only=True)["global_step"] for path in paths)


def test_best_and_newest_stay_on_resume_too(project: Project) -> None:
    run = project.fit(*OPTIONS)
    losses = {point["step"]: point["loss"] for point in run.summary()["validation"][1:]}
    best = min(losses, key=lambda step: losses[step])
    assert best < 10, losses
    assert steps(run.folder) == [best, 12]
    cut = project.root / "lightning_logs/tiny/version_1"
    with pytest.raises(Stopped):
        project("fit", "--recipe", "tiny.yaml", *OPTIONS, *at(11, "stop"))
    forget_stop(cut)
    assert steps(cut) == [best, 10]
    result = project("fit", "--recipe", "tiny.yaml", *OPTIONS, "--resume", "auto")
    assert result.code == 0, result.err
    assert steps(cut) == [best, 12]
