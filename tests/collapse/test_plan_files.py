"""Broken plan files, from tests/corpus and made at random: refused in one line, or the very plan that was written."""

import copy
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from laco_train.collapse import CollapsePlan, apply_plan
from laco_train.errors import InputError
from tests.collapse.helpers import assert_same_weights
from tests.spoilt import spoilt

CORPUS = sorted((Path(__file__).parents[1] / "corpus/plans").iterdir())


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_corpus(path: Path) -> None:
    with pytest.raises(InputError, match=r"^collapse\.plan: ") as error:
        CollapsePlan.load(path)
    line = str(error.value)
    assert "\n" not in line and path.name in line and len(line) < 1000


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_bytes_at_random(nine: LlamaForCausalLM, plan: CollapsePlan, tmp_path: Path, data: st.DataObject) -> None:
    """What is still a plan of this model makes of it what the whole file makes of it."""
    path = tmp_path / "plan.json"
    plan.save(path)
    path.write_bytes(spoilt(data, path.read_bytes()))
    try:
        read = CollapsePlan.load(path)
        made = apply_plan(copy.deepcopy(nine), read)
    except InputError as error:
        assert error.key.startswith("collapse.plan")
        assert "\n" not in str(error) and len(str(error)) < 1000
    else:
        assert read.lineage == plan.lineage
        assert_same_weights(made, apply_plan(copy.deepcopy(nine), plan))


HUGE = st.sampled_from([10**400, -(10**30), 2**63, 10**9, 1e308, float("inf"), float("-inf"), float("nan")])
NESTED = st.recursive(
    HUGE | st.none(), lambda some: st.lists(some, max_size=2) | st.dictionaries(st.text(), some, max_size=2)
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_huge_numbers_and_nesting_anywhere(plan: CollapsePlan, tmp_path: Path, data: st.DataObject) -> None:
    """Numbers that decide what is done are refused: those that only tell may be of any size."""
    values = plan.to_dict()
    place, step = values, data.draw(st.sampled_from(sorted(values)))
    while isinstance(place[step], (dict, list)) and place[step] and data.draw(st.booleans()):
        place = place[step]
        step = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
    place[step] = data.draw(HUGE | NESTED)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    try:
        read = CollapsePlan.load(path)
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
    else:
        assert (read.merges, read.removed, read.lineage) == (plan.merges, plan.removed, plan.lineage)
        read.save(path)  # so it holds no number that JSON has not
        assert CollapsePlan.load(path) == read
