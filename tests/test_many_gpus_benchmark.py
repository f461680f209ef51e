"""benchmarks/many_gpus.py compares speeds that one slow interval does not decide."""

import json
import sys
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))  # its scripts import each other by name

from many_gpus import Place, beside


def write_run(work: Path, name: str, speeds: list[float], whole: float, loss: float) -> None:
    """As fit leaves it."""
    folder = work / "lightning_logs" / name / "version_0"
    with SummaryWriter(str(folder)) as writer:
        for step, speed in enumerate(speeds):
            writer.add_scalar("train/tokens_per_second", speed, 10 * step)
    summary = {"source_depth": 30, "depth": 22, "parameters": {"after": 1000}, "steps": 40, "tokens": 4000, "mfu": 0.5}
    summary |= {"tokens_per_second": whole, "peak_gib": 2.0, "state_gib": 1.0, "kernels": "", "checkpointed_layers": 0}
    summary |= {"validation": [{"step": 0, "loss": 5.0}, {"step": 40, "loss": loss}]}
    (folder / "summary.json").write_text(json.dumps(summary))


def test_speeds_are_medians_over_the_intervals_of_all_runs(tmp_path: Path) -> None:
    write_run(tmp_path, "one", [400.0, 100.0, 400.0], 250.0, 3.0)
    write_run(tmp_path, "two", [720.0, 800.0, 760.0], 750.0, 3.5)
    write_run(tmp_path, "two_again", [10.0, 760.0, 760.0], 500.0, 3.25)
    row = beside(Place(tmp_path, ""), ["two", "two_again"], ["one"], 2, "DDP")
    assert (row["tokens_per_second"], row["one_gpu"]["tokens_per_second"]) == (760.0, 400.0)
    assert row["scaling"] == pytest.approx(760 / 2 / 400)
    assert row["scaling_of_whole_runs"] == pytest.approx((750 + 500) / 2 / 2 / 250)
    assert row["tokens_per_second_by_interval"] == [[720, 800, 760], [10, 760, 760]]
    assert row["matmul_share"] == pytest.approx(0.5 * 760 / 750)
    assert (row["case"], row["loss_apart"]) == ("two", 0.5)
