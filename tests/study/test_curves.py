"""Reading runs: one curve from several rounds, arms from seeds, and folders that are no run."""

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from laco_train.collapse import collapse_model
from laco_train.errors import InputError
from laco_train.settings import CollapseSettings
from laco_train.study.curves import Point, Segment, arms_of, joined
from laco_train.study.read import count_stored, read_runs, study_folders
from tests.study.fake_runs import losses, summary, write_rounds, write_run, write_study

GAPS = st.lists(st.integers(1, 1000), min_size=1, max_size=5)


def segment(gaps: list[int], cost: float, start: int = 0, speed: float = 2.0) -> Segment:
    tokens = [start]
    for gap in gaps:
        tokens.append(tokens[-1] + gap)
    return Segment(4, tuple(Point(n, 1.0, n / speed) for n in tokens), cost)


@given(st.lists(st.tuples(GAPS, st.floats(1, 100)), min_size=1, max_size=4))
def test_segments_make_one_curve(parts: list[tuple[list[int], float]]) -> None:
    """Tokens, seconds and FLOPs add up over rounds."""
    own = joined([segment(gaps, cost) for gaps, cost in parts])
    tokens, flops = 0, 0.0
    for found, (gaps, cost) in zip(own, parts, strict=True):
        assert found.points[0].tokens == tokens
        assert found.points[0].flops == pytest.approx(flops)
        tokens, flops = tokens + sum(gaps), flops + sum(gaps) * cost
        assert found.points[-1].tokens == tokens
        assert found.points[-1].flops == pytest.approx(flops)
        assert found.points[-1].seconds == pytest.approx(tokens / 2)


def test_refinement_counts_in_all_three() -> None:
    """A round begins with it: at tokens, seconds and FLOPs above 0; the second as long as all of the first."""
    first, second = segment([10], 2.0, start=20), segment([4], 3.0, start=100)
    found = [(p.tokens, p.seconds, p.flops) for s in joined([first, second]) for p in s.points]
    assert found == [(20, 10, 40), (30, 15, 60), (130, 65, 360), (134, 67, 372)]


def test_one_round_without_time_leaves_the_whole_curve_without() -> None:
    timed, untimed = segment([10], 2.0), Segment(3, (Point(0, 2.0), Point(10, 1.0)), 2.0)
    found = joined([timed, untimed])
    assert [p.seconds for p in found[0].points] == [0, 5]
    assert [p.seconds for p in found[1].points] == [None, None]
    assert [p.flops for s in joined([timed, Segment(3, untimed.points)]) for p in s.points] == [0, 20, None, None]


def test_a_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a/version_0", summary([(0, 6.0), (10, 3.0)]), 1e-3, seed=5)
    (run,) = read_runs(folder)
    assert (run.name, run.seed, run.depth, run.source_depth, run.learning_rate) == ("laco", 5, 22, 30, 1e-3)
    assert [(p.tokens, p.loss) for p in run.points] == [(0, 6.0), (327_680, 3.0)]
    assert run.points[-1].flops == 327_680 * 6.0 * run.parameters
    assert run.validation_sha256 == "a" * 64
    assert run.export is None


def test_a_run_that_kept_neither_time_nor_data(tmp_path: Path) -> None:
    """As runs before the study did."""
    (run,) = read_runs(write_run(tmp_path, summary([(0, 6.0), (10, 3.0)], timed=False, sha=None)))
    assert [p.seconds for p in run.points] == [None, None]
    assert run.validation_sha256 is None


def test_rounds(tmp_path: Path) -> None:
    for number, depth in ((1, 22), (2, 15)):
        write_run(tmp_path / f"run/round_{number}", summary([(0, 6.0), (10, 3.0)], depth=depth))
    (tmp_path / "run/round_2/export").mkdir()
    (run,) = read_runs(tmp_path / "run")
    assert [s.depth for s in run.segments] == [22, 15]
    assert [p.tokens for p in run.points] == [0, 327_680, 327_680, 655_360]
    assert (run.depth, run.name) == (15, "laco in 2 rounds")
    assert run.export == tmp_path / "run/round_2/export"
    (tmp_path / "run/round_2/summary.json").unlink()
    with pytest.raises(InputError, match="round_2 is not finished"):
        read_runs(tmp_path / "run")


def test_round_10_comes_after_round_9(tmp_path: Path) -> None:
    for number in range(1, 11):
        write_run(tmp_path / f"round_{number}", summary([(0, 6.0 + number), (10, 3.0)]))
    (run,) = read_runs(tmp_path)
    assert [s.points[0].loss for s in run.segments] == [6.0 + number for number in range(1, 11)]


def test_arms_of_a_study(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study", (0, 1))
    assert len(study_folders(study)) == 18
    arms = arms_of(read_runs(study))
    assert {arm.name: [run.seed for run in arm.runs] for arm in arms}["laco"] == [0, 1]
    assert len(arms) == 9
    assert [arm.name for arm in arms if not arm.is_rival] == ["original", "scratch"]
    (study / "sleb-seed1/version_0/summary.json").unlink()
    assert {arm.name: len(arm.runs) for arm in arms_of(read_runs(study))}["sleb"] == 1


def test_runs_that_differ_in_seeds_only_are_one_arm(tmp_path: Path) -> None:
    curve = losses(6.0, 4.0, 3.0, 60)
    for version, (seed, rate) in enumerate([(0, 1e-3), (1, 1e-3), (0, 2e-3)]):
        write_run(tmp_path / f"tiny/version_{version}", summary(curve), rate, seed)
    runs = [run for version in range(3) for run in read_runs(tmp_path / f"tiny/version_{version}")]
    arms = arms_of([*runs, runs[0]])
    assert [(arm.name, [run.seed for run in arm.runs]) for arm in arms] == [
        ("tiny/version_0", [0, 1]),
        ("tiny/version_2", [0]),
    ]


def test_the_same_seed_twice_is_two_arms(tmp_path: Path) -> None:
    for version in range(2):
        write_run(tmp_path / f"tiny/version_{version}", summary(losses(6.0, 4.0, 3.0, 60)))
    runs = [run for version in range(2) for run in read_runs(tmp_path / f"tiny/version_{version}")]
    assert [(arm.name, len(arm.runs)) for arm in arms_of(runs)] == [("tiny/version_0", 1), ("tiny/version_1", 1)]


def test_runs_that_differ_in_a_later_round_are_no_seeds_of_one_arm(tmp_path: Path) -> None:
    for name, rate in (("slow", 1e-4), ("fast", 1e-3)):
        write_rounds(tmp_path / f"{name}/version_0", second_rate=rate)
    write_rounds(tmp_path / "fast/version_1", second_rate=1e-3, seed=1)
    write_run(tmp_path / "once/version_0", summary(losses(6.76, 3.6, 3.2, 30)))  # as the first round of all
    places = ["slow/version_0", "fast/version_0", "fast/version_1", "once/version_0"]
    arms = arms_of([run for place in places for run in read_runs(tmp_path / place)])
    assert [(arm.name, [run.seed for run in arm.runs]) for arm in arms] == [
        ("slow", [0]),
        ("fast", [0, 1]),
        ("laco", [0]),
    ]


def test_runs_of_one_strategy_have_the_names_of_their_recipes(tmp_path: Path) -> None:
    places = [("once", 0, 1e-3), ("three", 0, 2e-3), ("three", 1, 3e-3)]
    for name, version, rate in places:
        write_run(tmp_path / f"{name}/version_{version}", summary(losses(6.0, 4.0, 3.0, 60)), rate, 0)
    runs = [run for name, version, _ in places for run in read_runs(tmp_path / f"{name}/version_{version}")]
    assert [arm.name for arm in arms_of(runs[:2])] == ["once", "three"]
    assert [arm.name for arm in arms_of(runs)] == ["once", "three/version_0", "three/version_1"]


def test_equal_arms_of_two_studies_stay_apart(tmp_path: Path) -> None:
    runs = [run for name in ("one", "two") for run in read_runs(write_study(tmp_path / name))]
    assert {arm.name for arm in arms_of(runs)} >= {"one/laco", "two/laco"}


def test_names_grow_until_they_differ(tmp_path: Path) -> None:
    for root in ("one", "two"):
        write_run(
            tmp_path / root / "logs/r/version_0", summary(losses(6.0, 4.0, 3.0, 60)), 1e-3 if root == "one" else 2e-3, 0
        )
        write_study(tmp_path / root / "study")
    found = [run for root in ("one", "two") for run in read_runs(tmp_path / root / "logs/r/version_0")]
    assert [arm.name for arm in arms_of(found)] == ["one/logs/r/version_0", "two/logs/r/version_0"]
    studies = [run for root in ("one", "two") for run in read_runs(tmp_path / root / "study")]
    names = [arm.name for arm in arms_of(studies)]
    assert len(set(names)) == len(names) and {"one/study/laco", "two/study/laco"} <= set(names)


def test_an_export(tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    folder = tiny_folder(layers=3)
    (run,) = read_runs(folder)
    assert (run.name, run.depth, run.segments, run.export) == ("model", 3, (), folder)
    from safetensors.torch import load_file

    assert (
        run.parameters
        == count_stored(folder)
        == sum(t.numel() for t in load_file(folder / "model.safetensors").values())
    )
    assert arms_of([run])[0].budget == 0


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def stored(header: str, length: int | None = None) -> bytes:
    """A safetensors file of `header` alone, which says that it is so long."""
    return struct.pack("<Q", len(header) if length is None else length) + header.encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("collapse_plan.json", b"{}"),
        ("collapse_plan.json", b'{"format_version": 1}'),
        ("collapse_plan.json", POINTER),
        ("model.safetensors", POINTER),
        ("model.safetensors", b""),
        ("model.safetensors", stored("{}", length=3)),
        ("model.safetensors", stored("{]")),
        ("model.safetensors", stored("[1]")),
        ("model.safetensors", stored('{"w": 3}')),
        ("model.safetensors", stored('{"w": {}}')),
        ("model.safetensors", stored('{"w": {"shape": 3}}')),
        ("model.safetensors", b"\x04\0\0\0\0\0\0\0{}\xff\xff"),
    ],
)
def test_an_export_that_is_damaged(tiny_folder: Callable[..., Path], name: str, content: bytes) -> None:
    folder = tiny_folder(layers=1)
    (folder / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        read_runs(folder)
    assert str(folder / name) in str(error.value) and "\n" not in str(error.value)


def test_an_export_with_a_plan(tmp_path: Path, tiny_folder: Callable[..., Path], tiny_tokenizer: Any) -> None:
    folder = tiny_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plan = collapse_model(model, tiny_tokenizer, CollapseSettings(strategy="tail", target_depth=4))[1]
    plan.save(folder / "collapse_plan.json")
    (run,) = read_runs(folder)
    assert (run.strategy, run.source_depth, run.depth) == ("tail", 6, 4)
    assert (run.source_parameters, run.parameters) == (plan.parameters.before, plan.parameters.after)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run of fit, no study and no exported model"):
        read_runs(tmp_path)
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(InputError, match="is not finished"):
        read_runs(tmp_path)
    (tmp_path / "summary.json").write_text("[1")
    with pytest.raises(InputError, match=r"summary.json: can't be read"):
        read_runs(tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps({"validation": []}))
    with pytest.raises(InputError, match="is not what fit writes"):
        read_runs(tmp_path)


def test_reading_needs_no_torch() -> None:
    code = "import sys, laco_train.study.read, laco_train.study.measures; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
