"""Why no fit goes on from a search that accepted nothing."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from laco_train.collapse import CollapsePlan, make_plan
from laco_train.collapse.report import describe
from laco_train.collapse.unmerged import refuse_nothing_merged
from laco_train.errors import InputError
from laco_train.settings import CollapseSettings
from tests.collapse.helpers import TEXTS, scramble
from tests.collapse.tiny import tiny


@pytest.fixture
def plan_of(tiny_llama: Callable[..., LlamaForCausalLM], tiny_tokenizer: PreTrainedTokenizerBase) -> Any:
    """The plan of a scrambled Llama by settings."""

    def build(**values: Any) -> CollapsePlan:
        settings = CollapseSettings(layers_per_merge=2, calibration=TEXTS, **values)
        return make_plan(scramble(tiny_llama(), seed=1), tiny_tokenizer, settings)

    return build


def test_it_names_the_highest_similarity(plan_of: Callable[..., CollapsePlan]) -> None:
    plan = plan_of(similarity_threshold=1.0)
    best = max(plan.candidates, key=lambda c: c.similarity or -1.0)
    with pytest.raises(InputError, match=r"^collapse\.similarity_threshold: no merge is above T = 1\.0") as error:
        refuse_nothing_merged(plan)
    assert f"{best.similarity:.4f} (layers {best.layer} to {best.layer + 1}, from 0)" in str(error.value)
    assert "skipped" not in str(error.value)
    assert describe(plan)[0].startswith("Nothing was collapsed: all 6 layers stay (")


@pytest.mark.parametrize("values", [{"similarity_threshold": -1.0}, {"strategy": "none"}, {"remove": [2]}])
def test_what_was_asked_for_is_not_refused(plan_of: Callable[..., CollapsePlan], values: dict[str, Any]) -> None:
    plan = plan_of(**values)
    refuse_nothing_merged(plan)
    assert not describe(plan)[0].startswith("Nothing")


def test_skipped_windows_are_told(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    settings = CollapseSettings(layers_per_merge=2, similarity_threshold=1.0, calibration=TEXTS)
    plan = make_plan(tiny("smollm3"), tiny_tokenizer, settings)
    with pytest.raises(InputError, match=r"; 2 windows are skipped, .* set collapse\.mixed_types to first"):
        refuse_nothing_merged(plan)


def test_no_merge_that_is_finite(plan_of: Callable[..., CollapsePlan]) -> None:
    plan = plan_of(similarity_threshold=1.0)
    not_finite = "final hidden states are not finite"
    candidates = tuple(dataclasses.replace(c, similarity=None, skipped=not_finite) for c in plan.candidates)
    with pytest.raises(InputError, match=r"^model\.dtype: .* such as float32"):
        refuse_nothing_merged(dataclasses.replace(plan, candidates=candidates))
