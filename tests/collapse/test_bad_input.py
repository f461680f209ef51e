"""Broken plan files and settings that no model can meet: each an InputError that names the key, nothing touched."""

import contextlib
import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from laco_train.collapse import CollapsePlan, collapse_model
from laco_train.errors import InputError
from laco_train.settings import CollapseSettings
from tests.collapse.helpers import ALL_KEPT, TEXTS, assert_same_weights

Json = dict[str, Any]


def at(path: str, value: Any) -> Callable[[Json], None]:
    """A change that sets the entry at dotted `path`."""

    def change(values: Any) -> None:
        *way, name = [int(step) if step.isdigit() else step for step in path.split(".")]
        for step in way:
            values = values[step]
        values[name] = value

    return change


BROKEN: dict[str, Callable[[Json], Any]] = {
    "a version to come": at("format_version", 2),
    "a version as text": at("format_version", "1"),
    "unknown key": at("notes", "mine"),
    "unknown key in a merge": at("merges.0.weight", 1.0),
    "missing key": lambda v: v.pop("lineage"),
    "missing key in a merge": lambda v: v["merges"][0].pop("absorbed"),
    "depth as text": at("depth", "3"),
    "depth as truth": at("depth", True),
    "round as truth": at("round", True),
    "similarity as truth": at("merges.0.similarity", True),
    "depth as a fraction": at("depth", 3.0),
    "merge_norms as a number": at("merge_norms", 1),
    "merges as an object": at("merges", {}),
    "a merge as a list": at("merges.0", [5, 2, 0.9]),
    "merges as null": at("merges", None),
    "settings as a list": at("settings", []),
    "settings without a threshold": at("settings", {}),
    "threshold as text": at("settings.similarity_threshold", "0.65"),
    "threshold as truth": at("settings.similarity_threshold", True),
    "target_depth as a fraction": at("settings.target_depth", 4.5),
    "target_ratio as text": at("settings.target_ratio", "0.2"),
    "target_ratio above all": at("settings.target_ratio", 1e308),
    "refine as a list": at("settings.refine", [1]),
    "refine for text": at("settings.refine.tokens", "160"),
    "parameters as null": at("parameters", None),
    "calibration as text": at("calibration", "calibration_en.txt"),
    "lineage not nested": at("lineage", [0, 1, 8]),
    "similarity as text": at("merges.0.similarity", "0.9"),
    "unknown rule": at("merge_rule", "average"),
    "merge at -1": at("merges.0.layer", -1),
    "merge past the end": at("merges.0.layer", 7),
    "merge past the end as it then stood": at("merges.2.layer", 4),
    "merge that absorbs nothing": at("merges.0.absorbed", 0),
    "merge left out": lambda v: v["merges"].pop(),
    "removed past the end": at("removed", [9]),
    "removed at -1": at("removed", [-1]),
    "removed but merged": at("removed", [4]),
    "lineage past the end": at("lineage.2", [9]),
    "lineage in another order": at("lineage", [[0], [8], [1, 2, 3, 4, 5, 6, 7]]),
    "lineage that names one twice": at("lineage.0", [0, 0]),
    "lineage that lacks one": at("lineage.1", [1, 2, 3, 4, 5, 6]),
    "depth that is not the lineage's": at("depth", 4),
    "source_depth that is not the lineage's": at("source_depth", 10),
    "rule that leaves another lineage": at("merge_rule", "drop"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_inconsistent_plan(written: Json, tmp_path: Path, case: str) -> None:
    values = copy.deepcopy(written)
    BROKEN[case](values)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(InputError) as error:
        CollapsePlan.load(path)
    assert error.value.key.startswith("collapse.plan")
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert CollapsePlan.from_dict(written)  # the change, not the plan, is at fault


def test_file_cut_short_anywhere(plan: CollapsePlan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    whole = path.read_bytes().rstrip()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError):
            CollapsePlan.load(path)


@pytest.mark.parametrize("content", [b"[]", b"null", b"3", b"\xff\xfe{}", b"[" * 100_000, b"{'a': 1}"])
def test_file_that_is_no_plan(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(InputError):
        CollapsePlan.load(path)


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(InputError, match=r"^collapse\.plan: "):
            CollapsePlan.load(path)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_other_value_is_refused_or_kept(written: Json, data: st.DataObject) -> None:
    """Whatever replaces whatever in the file, the outcome is an InputError or a plan that says just that."""
    values = copy.deepcopy(written)
    place, step = values, data.draw(st.sampled_from(sorted(values)))
    while isinstance(place[step], (dict, list)) and place[step] and data.draw(st.booleans()):
        place = place[step]
        step = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
    scalars = st.none() | st.booleans() | st.integers(-3, 50) | st.floats(allow_nan=False) | st.text(max_size=3)
    place[step] = data.draw(scalars | st.lists(scalars, max_size=2) | st.dictionaries(st.text(), scalars, max_size=2))
    with contextlib.suppress(InputError):
        assert CollapsePlan.from_dict(values).to_dict() == values


BAD_SETTINGS: list[tuple[Json, str]] = [
    ({"layers_per_merge": 1}, "collapse.layers_per_merge"),
    ({"layers_per_merge": 0}, "collapse.layers_per_merge"),
    ({"layers_per_merge": 10}, "collapse.layers_per_merge"),
    ({"lowest_layer": 0}, "collapse.lowest_layer"),
    ({"lowest_layer": 9}, "collapse.lowest_layer"),
    ({"lowest_layer": 6, "highest_layer": 5}, "collapse.lowest_layer"),
    ({"highest_layer": 10}, "collapse.highest_layer"),
    ({"layers_per_merge": 4, "lowest_layer": 3, "highest_layer": 6}, "collapse.highest_layer"),
    ({"layers_per_merge": 9}, "collapse.highest_layer"),
    ({"min_interval": 0}, "collapse.min_interval"),
    ({"similarity_threshold": 1.01}, "collapse.similarity_threshold"),
    ({"similarity_threshold": -1.01}, "collapse.similarity_threshold"),
    ({"similarity_threshold": float("nan")}, "collapse.similarity_threshold"),
    ({"calibration": []}, "collapse.calibration"),
    ({"calibration": ["", "  "]}, "collapse.calibration"),
    ({"calibration": "no_such_file.txt"}, "collapse.calibration"),
    ({"remove": []}, "collapse.remove"),
    ({"remove": [9]}, "collapse.remove"),
    ({"remove": [-1]}, "collapse.remove"),
    ({"remove": [3, 3]}, "collapse.remove"),
    ({"remove": list(range(9))}, "collapse.remove"),
    ({"remove": [3], "plan": "plan.json"}, "collapse.plan"),
    ({"plan": "no_such_plan.json"}, "collapse.plan"),
]


@pytest.mark.parametrize(("bad", "key"), BAD_SETTINGS, ids=lambda value: str(value))
def test_bad_settings_name_their_key_and_touch_nothing(
    nine: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase, bad: Json, key: str
) -> None:
    model = copy.deepcopy(nine)
    with pytest.raises(InputError) as error:
        collapse_model(model, tiny_tokenizer, CollapseSettings(**{"calibration": TEXTS, **bad}))
    assert error.value.key == key
    assert "\n" not in str(error.value)
    assert_same_weights(model, nine)
    assert model.config.to_dict() == nine.config.to_dict()


@pytest.mark.parametrize("content", ["", "\n  \n"])
def test_empty_calibration_file(
    nine: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, content: str
) -> None:
    path = tmp_path / "calibration.txt"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"^collapse\.calibration: "):
        collapse_model(copy.deepcopy(nine), tiny_tokenizer, CollapseSettings(calibration=str(path)))


def test_calibration_file_holds_one_sample_a_line(
    nine: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase, plan: CollapsePlan, tmp_path: Path
) -> None:
    path = tmp_path / "calibration.txt"
    path.write_text("\n\n".join(TEXTS) + "\n", encoding="utf-8")
    wanted = dataclasses.replace(ALL_KEPT, calibration=str(path))
    _, from_file = collapse_model(copy.deepcopy(nine), tiny_tokenizer, wanted)
    assert from_file.calibration == plan.calibration
    assert [m.similarity for m in from_file.merges] == [m.similarity for m in plan.merges]
