"""What a run writes on the disk is what is said before it starts."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from laco_train.errors import InputError
from laco_train.settings import (
    CollapseSettings,
    ExportSettings,
    LoraSettings,
    ModelSettings,
    OptimizerSettings,
    RefineSettings,
)
from laco_train.study.disk import RunSize, check_room, needed, run_size
from tests.cli.runs import Project
from tests.study.studies import ready, study_of, write_recipe

COLLAPSE = CollapseSettings(remove=[1, 4])
METHODS = {
    "full": ModelSettings("model"),
    "bfloat16": ModelSettings("model", dtype="bfloat16"),
    "exact": ModelSettings("model", dtype="bfloat16", optimizer=OptimizerSettings(small_updates="float32")),
    "lora": ModelSettings("model", method="lora", lora=LoraSettings(rank=3)),
    "last_layers": ModelSettings("model", method="last_layers", last_layers=2),
}


def tensor_bytes(values: Any) -> int:
    """Bytes of the tensors in nested `values` that are no counters."""
    if isinstance(values, Tensor):
        return values.numel() * values.element_size() if values.dim() else 0
    if isinstance(values, dict | list | tuple):
        return sum(tensor_bytes(value) for value in (values.values() if isinstance(values, dict) else values))
    return 0


@pytest.mark.parametrize("name", METHODS)
def test_a_run_writes_what_was_said(shared_project: Project, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model = METHODS[name]
    options = [f"--model.method={model.method}", "--model.lora.rank=3", "--model.last_layers=2"]
    options += [f"--model.dtype={model.dtype}", f"--model.optimizer.small_updates={model.optimizer.small_updates}"]
    run = shared_project.fit(*options, "--collapse.remove=[1,4]", "--collapse.similarity_threshold=null")
    monkeypatch.chdir(shared_project.root)
    size = run_size(model, COLLAPSE, ExportSettings(), "32-true", kept=1)
    state = run.state()
    assert size.checkpoint == tensor_bytes(state["state_dict"]) + tensor_bytes(state["optimizer_states"])
    files = {kind: list(run.folder.glob(f"{kind}/*.safetensors")) for kind in ("export", "adapter")}
    stored = {kind: sum(path.stat().st_size for path in found) for kind, found in files.items()}
    assert size.export == pytest.approx(stored["export"], abs=8_192)  # of headers
    assert size.stays - size.checkpoint == pytest.approx(stored["adapter"], abs=8_192)


@pytest.mark.parametrize("strategy", ["angular", "streamline"])
@pytest.mark.parametrize("tokens", [0, 128])
def test_what_is_fitted_before_training_stays_too(
    shared_project: Project, monkeypatch: pytest.MonkeyPatch, strategy: str, tokens: int
) -> None:
    """A whole model after refinement, a layer of streamline's without."""
    collapse = {"strategy": strategy, "target_depth": 4, "similarity_threshold": "null"}
    options = [f"--collapse.{key}={value}" for key, value in collapse.items()]
    refine = [f"--collapse.refine.tokens={tokens}", "--collapse.refine.batch_size=2"]
    run = shared_project.fit(*options, *refine, "--export.enabled=false", "--trainer.max_steps=1")
    monkeypatch.chdir(shared_project.root)
    asked = CollapseSettings(strategy=strategy, target_depth=4, refine=RefineSettings(tokens=tokens))
    size = run_size(METHODS["full"], asked, ExportSettings(enabled=False), "32-true", kept=1)
    stored = sum(path.stat().st_size for path in run.folder.glob("refined-*.safetensors"))
    assert size.stays - size.checkpoint == pytest.approx(stored, abs=8_192)


def test_each_run_stays_and_one_checkpoint_is_being_written(tmp_path: Path) -> None:
    runs = [(RunSize(10, 20, 3), tmp_path / "none"), (RunSize(8, 16, 4), tmp_path / "some")]
    assert needed(runs) == 20 + 3 + 16 + 4 + 10
    assert needed(runs, exports_stay=False) == needed(runs)  # two exports, the later beside the earlier
    (tmp_path / "some/checkpoints").mkdir(parents=True)
    (tmp_path / "some/checkpoints/one.ckpt").write_bytes(b"8 bytes.")
    assert needed(runs) == 20 + 3 + 16 + 4 + 10 - 8
    (tmp_path / "some/other").write_bytes(bytes(1000))  # room for it is no room for the other run
    assert needed(runs) == 20 + 3 + 10
    three = [(RunSize(1, 1, export), tmp_path / "none") for export in (5, 7, 1)]
    assert needed(three, exports_stay=False) == 3 + 5 + 7 + 1
    assert needed([]) == 0


def test_a_study_needs_no_room_for_what_is_there(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    write_recipe(project, {"study": {"seeds": [0]}})
    run = study_of(project, "--arms", "laco").run("laco-seed0")
    (run / "summary.json").unlink()
    kept = [path.stat().st_size for path in run.glob("checkpoints/*")]
    free = shutil.disk_usage(project.root)._replace(free=(3 - len(kept)) * kept[0])  # of three, with the one in writing
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    ready(project, "--arms", "laco")
    with pytest.raises(InputError, match="GiB of disk are needed"):
        ready(project, "--arms", "scratch")


def test_a_file_is_no_place_for_runs(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"trainer\.default_root_dir: .*file is no folder; name another place"):
        check_room(0, tmp_path / "file/lightning_logs/s")
    assert "0.00 GiB of disk are needed" in check_room(0, tmp_path / "none/lightning_logs/s")
