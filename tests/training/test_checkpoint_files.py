"""Broken and foreign checkpoints: passed over by --resume auto, refused by name where they are named; none is run."""

import copy
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import save

from laco_train.cli.resume import newest_good
from laco_train.errors import InputError
from laco_train.training.checkpoint import read_checkpoint
from laco_train.training.checkpoint_io import VerifiedCheckpointIO
from laco_train.training.module import CHECKPOINT_KEY
from tests.cli.runs import Project, shared_project
from tests.cli.test_bad_input import refused
from tests.spoilt import Evil, spoilt

__all__ = ["shared_project"]

CORPUS = sorted((Path(__file__).parents[1] / "corpus/checkpoints").iterdir())
SMALL: dict[str, Any] = {CHECKPOINT_KEY: {}, "global_step": 3, "state_dict": {"w": torch.arange(1000.0)}}


@pytest.fixture(scope="module")
def project(shared_project: Project) -> Project:
    """A project, its run of two steps in lightning_logs."""
    shared_project.fit("--trainer.max_steps", "2", "--export.enabled", "false")
    return shared_project


@pytest.fixture(scope="module")
def whole(project: Project) -> Path:
    """A real checkpoint."""
    (path,) = project.root.glob("lightning_logs/tiny/version_0/checkpoints/*.ckpt")
    return path


@pytest.fixture(scope="module")
def content(whole: Path) -> dict[str, Any]:
    """What is in it, its optimizer's states aside."""
    values: dict[str, Any] = torch.load(whole, weights_only=True)
    return {name: value for name, value in values.items() if name != "optimizer_states"}


def line_of(path: Path) -> str | None:
    """The one line that reading `path` ends in; None if it is read."""
    try:
        read_checkpoint(path)
    except InputError as error:
        line = str(error)
        assert line.startswith(f"--checkpoint: {path} "), line
        assert "\n" not in line and len(line) < 1000
        return line
    return None


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_corpus(path: Path, tmp_path: Path) -> None:
    """Refused in one line where it is named, passed over in one where it is found beside a whole one."""
    assert line_of(path) is not None
    older, newer = (tmp_path / "checkpoints" / f"epoch=0-step={step}.ckpt" for step in (3, 5))
    VerifiedCheckpointIO().save_checkpoint(SMALL, older)
    shutil.copy(path, newer)
    said: list[str] = []
    assert newest_good(older.parent, said.append) == older
    assert len(said) == 1 and "\n" not in said[0]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_finder_passes_over_what_is_spoilt(tmp_path: Path, data: st.DataObject) -> None:
    """The older whole one is found, or the spoilt one if nothing that counts is: then its weights are those written."""
    shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
    older, newer = (tmp_path / "checkpoints" / f"epoch=0-step={step}.ckpt" for step in (3, 5))
    VerifiedCheckpointIO().save_checkpoint(SMALL, older)
    VerifiedCheckpointIO().save_checkpoint({**SMALL, "global_step": 5}, newer)
    newer.write_bytes(spoilt(data, newer.read_bytes()))
    said: list[str] = []
    found = newest_good(older.parent, said.append)
    assert (found == older and len(said) == 1 and "\n" not in said[0]) or found == newer
    values = torch.load(found, weights_only=True)
    assert torch.equal(values["state_dict"]["w"], SMALL["state_dict"]["w"])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_spoilt_one_is_never_another_model(
    whole: Path, content: dict[str, Any], tmp_path: Path, data: st.DataObject
) -> None:
    path = tmp_path / "a.ckpt"
    directory = data.draw(st.sampled_from([0, 5000]))  # at the end: the archive's table of contents
    original = whole.read_bytes()
    path.write_bytes(spoilt(data, original, least=max(0, len(original) - directory) if directory else 0))
    if line_of(path) is None:
        read = read_checkpoint(path).state_dict
        assert all(torch.equal(read[name], value) for name, value in content["state_dict"].items())


def test_one_bit_of_a_weight(whole: Path, tmp_path: Path) -> None:
    data = bytearray(whole.read_bytes())
    data[len(data) // 2] ^= 1
    path = tmp_path / "bit.ckpt"
    path.write_bytes(data)
    assert "is damaged" in str(line_of(path))


def places(values: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Ways to everything in nested dicts and lists, four steps deep."""
    if before and (len(before) == 4 or not isinstance(values, dict | list)):
        return [before]
    steps = values if isinstance(values, dict) else range(len(values))
    here = [before] if before else []
    return here + [way for step in steps for way in places(values[step], (*before, step))]


WRONG = st.sampled_from([None, True, "x", -1, 10**30, float("nan"), [], {}, [[]], {"a": 1}, torch.zeros(2)])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_wrong_types_anywhere(content: dict[str, Any], tmp_path: Path, data: st.DataObject) -> None:
    """Whatever stands wherever: read with the types that it promises, or refused in one line."""
    ours = {name: content[name] for name in (CHECKPOINT_KEY, "callbacks", "global_step")}
    way = data.draw(st.sampled_from([*places(ours), ("state_dict",)]))
    values = {**content, **copy.deepcopy(ours)}
    place: Any = values
    for step in way[:-1]:
        place = place[step]
    if isinstance(place, dict) and data.draw(st.booleans()):
        del place[way[-1]]
    else:
        place[way[-1]] = data.draw(WRONG)
    path = tmp_path / "a.ckpt"
    torch.save(values, path)
    newest_good(tmp_path, lambda line: None)
    if line_of(path) is None:
        read = read_checkpoint(path)
        assert isinstance(read.steps, int) and isinstance(read.tokens, int) and isinstance(read.recipe, str)
        assert read.plan.lineage == content_plan(content)


def content_plan(content: dict[str, Any]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(layer) for layer in content[CHECKPOINT_KEY]["plan"]["lineage"])


def foreign_files(folder: Path, content: dict[str, Any], target: Path) -> list[Path]:
    """Pickles and the like under the names that they go by; those that could run code make `target`."""
    evil = Evil(target)
    (folder / "pickle.pkl").write_bytes(pickle.dumps(evil))
    (folder / "pickle.ckpt").write_bytes(pickle.dumps(evil, protocol=0))
    torch.save(evil, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": evil}, folder / "pytorch_model.bin")
    torch.save({**content, "hyper_parameters": evil}, folder / "globals.ckpt")
    np.save(folder / "array.npy", np.zeros(3))
    (folder / "empty.ckpt").touch()
    (folder / "text.ckpt").write_text("a checkpoint, they said\n")
    (folder / "zip.ckpt").write_bytes(b"PK\x05\x06" + bytes(18))
    torch.save(torch.zeros(2), folder / "tensor.ckpt")
    torch.save([1, 2], folder / "list.ckpt")
    torch.save({CHECKPOINT_KEY: {}}, folder / "hollow.ckpt")
    return sorted(folder.iterdir())


def test_foreign_files_are_refused_by_name(project: Project, content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    target = tmp_path / "ran"
    files = foreign_files(tmp_path / "files", content, target)
    assert len(files) == 12
    for path in files:
        line = line_of(path)
        assert line is not None, path
    assert "it names posix.mkdir, and nothing in a checkpoint is run" in str(line_of(tmp_path / "files/globals.ckpt"))
    key, problem = refused(project, "export", "--checkpoint", str(tmp_path / "files/globals.ckpt"), "--output", "new")
    assert key == "--checkpoint" and "globals.ckpt" in problem and "posix.mkdir" in problem
    for path in files:
        for source in (path, tmp_path / "files"):
            assert refused(project, "collapse", "--output", "new", "--model.source", str(source))[0] == "model.source"
    assert newest_good(tmp_path / "files", lambda line: None) is None
    assert not target.exists()


def test_folder_instead_of_a_file(project: Project, tmp_path: Path) -> None:
    (tmp_path / "epoch=0-step=9.ckpt").mkdir()
    said: list[str] = []
    assert newest_good(tmp_path, said.append) is None
    assert "has no meta.pt" in said[0]
    assert refused(project, "fit", "--recipe", "tiny.yaml", "--ckpt_path", str(tmp_path))[0] == "--ckpt_path"
    refused(project, "export", "--checkpoint", str(tmp_path), "--output", "new")


@pytest.mark.parametrize("file", ["meta.pt", ".metadata", "learning rate", "weight"])
def test_shards_run_nothing(tmp_path: Path, file: str) -> None:
    folder, target = tmp_path / "a.ckpt", tmp_path / "ran"
    evil = Evil(target)
    weights = {**SMALL["state_dict"], "v": evil if file == "weight" else torch.zeros(1)}
    groups = [{"lr": evil if file == "learning rate" else 0.1, "params": ["w"]}]
    optimizer = {"state": {}, "param_groups": groups, "more": 1}
    save({"state_dict": weights, "optimizer_0": optimizer}, checkpoint_id=folder, no_dist=True)
    torch.save({CHECKPOINT_KEY: {}, "global_step": 3}, folder / "meta.pt")
    if file == "meta.pt":
        torch.save({CHECKPOINT_KEY: {}, "global_step": 3, "more": evil}, folder / file)
    elif file == ".metadata":
        (folder / file).write_bytes(pickle.dumps(evil))
    assert newest_good(tmp_path, lambda line: None) is None
    assert "posix" in str(line_of(folder))
    assert not target.exists()


BROKEN = [b"", b"- a\n", b"\xff\xfe", b"model: [", b"model: " + b"[" * 5000, b"a: " + b"9" * 5000]


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_recipe_of_a_run_that_is_broken(project: Project, whole: Path, text: bytes) -> None:
    config = whole.parents[1] / "config.yaml"
    kept = config.read_bytes()
    config.write_bytes(text)
    try:
        key, problem = refused(project, "fit", "--recipe", "tiny.yaml", "--trainer.max_steps", "2", "--resume", "auto")
    finally:
        config.write_bytes(kept)
    assert key == "--resume" and "config.yaml" in problem
