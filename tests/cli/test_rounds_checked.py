"""Rounds before the first begins: depths that no search reaches, and the disk; and a run that stopped between two."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from laco_train.checks import least_depth
from laco_train.cli.rounds import check_reach
from laco_train.collapse import collapse_model
from laco_train.errors import InputError
from laco_train.settings import CollapseSettings, RoundSettings
from tests.cli.runs import CALIBRATION, Project
from tests.cli.test_rounds import FIT, done, refused, rounds_recipe

__all__ = ["done"]

LAYER, REST = 9_280, 20_512  # parameters of the tiny Llama: one of six layers, and all else
DEPTHS = (5, 3)
MODELS = [4 * (REST + depth * LAYER) for depth in DEPTHS]  # bytes of float32 weights
CHECKPOINTS = [3 * model for model in MODELS]  # with AdamW's two moments


@pytest.fixture
def copied(done: Project, tmp_path: Path) -> Project:
    """The same for one test."""
    return Project(shutil.copytree(done.root, tmp_path / "p"))


def run_of(project: Project) -> Path:
    return project.root / "lightning_logs" / "rounds" / "version_0"


def stopped_between(project: Project) -> Path:
    """Folder of its run, as it was left between the rounds."""
    folder = run_of(project)
    for name in ("round_2", "export"):
        shutil.rmtree(folder / name)
    for name in ("summary.json", "collapse_plan.json"):
        (folder / name).unlink()
    return folder


def test_a_run_that_stopped_between_rounds_is_not_finished(copied: Project) -> None:
    folder = stopped_between(copied)
    for verb in (("compare", str(folder)), ("export", "--checkpoint", str(folder), "--output", "out")):
        result = copied(*verb)
        assert (result.code, "version_0 is not finished (no summary.json)" in result.err) == (2, True), result
    assert not (copied.root / "out").exists()


def test_a_number_that_another_run_took_is_passed_over(copied: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = run_of(copied).parent / "version_1"

    def while_another_begins(wanted: int, folder: Path) -> str:
        assert folder.name == taken.name  # the number that was free
        (copied.root / taken).mkdir()
        return "enough"

    monkeypatch.setattr("laco_train.cli.rounds.check_room", while_another_begins)
    result = copied(*FIT, "--export.enabled=false")
    assert result.code == 0, result.err
    assert list((copied.root / taken).iterdir()) == []
    assert (copied.root / taken.parent / "version_2" / "summary.json").is_file()


def rounds(*depths: int) -> str:
    return f"--rounds={json.dumps([{'target_depth': depth} for depth in depths])}"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([rounds(5, 1)], "rounds[1].target_depth: is 1, but laco leaves 3 layers at least, by C"),
        ([rounds(3)], "rounds[0].target_depth: is 3, but laco leaves 4 layers at least, by C"),
        ([rounds(4, 1), "--collapse.strategy=greedy"], "rounds[1].target_depth: is 1, but greedy leaves 2 layers"),
    ],
)
def test_a_depth_out_of_reach_is_refused_before_the_first_round(done: Project, arguments: list[str], said: str) -> None:
    assert refused(done, *arguments).startswith(said)


@pytest.mark.parametrize("strategy", ["laco", "greedy"])
@pytest.mark.parametrize("c", [2, 3, 4])
@pytest.mark.parametrize(("low", "high"), [(1, None), (3, None), (1, 6), (2, 7)])
@pytest.mark.parametrize("interval", [1, 2, 5])
def test_the_least_depth_is_where_a_search_ends_that_accepts_all(
    tiny_llama: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: PreTrainedTokenizerFast,
    strategy: Any,
    c: int,
    low: int,
    high: int | None,
    interval: int,
) -> None:
    settings = CollapseSettings(
        strategy=strategy,
        layers_per_merge=c,
        lowest_layer=low,
        highest_layer=high,
        min_interval=interval,
        similarity_threshold=-1.0,
        calibration=CALIBRATION,
    )
    _, plan = collapse_model(tiny_llama(layers=8, hidden=16), tiny_tokenizer, settings)
    assert plan.depth == least_depth(settings, 8)


@pytest.mark.parametrize(("exact", "reached"), [(False, True), (True, False)])
def test_what_a_merge_of_several_layers_overshoots_is_counted_in(exact: bool, reached: bool) -> None:
    """With C = 4 two layers are reached from five, which a round to six may leave, and not from six."""
    settings = CollapseSettings(layers_per_merge=4, exact=exact)
    assert (least_depth(settings, 5), least_depth(settings, 6)) == (2, 3)
    two = [RoundSettings(target_depth=depth) for depth in (6, 2)]
    if reached:
        check_reach(two, settings, 8)
    else:
        with pytest.raises(InputError, match=r"rounds\[1\]\.target_depth: is 2, but laco leaves 3"):
            check_reach(two, settings, 8)


NEEDED = {
    "one checkpoint a round, and one in writing": ([], sum(MODELS) + sum(CHECKPOINTS) + CHECKPOINTS[0]),
    "no last export": (["--export.enabled=false"], MODELS[0] + sum(CHECKPOINTS) + CHECKPOINTS[0]),
    "the last export of two bytes": (
        ["--export.dtype=bfloat16"],
        MODELS[0] + MODELS[1] // 2 + sum(CHECKPOINTS) + CHECKPOINTS[0],
    ),
    "no checkpoints": (["--trainer.enable_checkpointing=false"], sum(MODELS)),
    "the best too": (
        ["--trainer.callbacks+=laco_train.callbacks.best_checkpoint.BestAndNewestCheckpoint"],
        sum(MODELS) + 2 * sum(CHECKPOINTS) + CHECKPOINTS[0],
    ),
    "two exports of three": (
        [rounds(5, 4, 3), "--export.keep_rounds=false"],
        4 * (2 * REST + 9 * LAYER) + 12 * (3 * REST + 12 * LAYER) + CHECKPOINTS[0],
    ),
}


@pytest.mark.parametrize(("arguments", "wanted"), NEEDED.values(), ids=NEEDED)
def test_the_disk_that_rounds_need(
    done: Project, monkeypatch: pytest.MonkeyPatch, arguments: list[str], wanted: int
) -> None:
    usage = shutil.disk_usage(done.root)
    for free, key in ((wanted - 1, "trainer.default_root_dir: 0.00 GiB of disk are needed"), (wanted, "data.train: ")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        assert refused(done, *arguments, "--data.train=missing.jsonl").startswith(key)


def test_what_a_run_has_written_is_not_needed_again(copied: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_of(copied)
    for name in ("summary.json", "round_2/summary.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "export")
    free = shutil.disk_usage(copied.root)._replace(free=CHECKPOINTS[1] + MODELS[1])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    result = copied(*FIT, "--resume=auto")
    assert result.code == 0, result.err
    assert (folder / "export").is_dir()


def test_a_tilde_is_the_users_folder(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    arguments = [*FIT, rounds(5), "--trainer.max_steps=2", "--trainer.default_root_dir=~/runs"]
    assert rounds_recipe(project)(*arguments).code == 0
    assert (tmp_path / "home/runs/lightning_logs/rounds/version_0/summary.json").is_file()
    again = project(*arguments, "--resume=auto")
    assert again.out.splitlines()[-1].endswith("is finished: there is nothing to resume.")
    assert not (project.root / "~").exists()
