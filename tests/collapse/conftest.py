"""One searched model that the tests of plans and of bad input share."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from laco_train.collapse import CollapsePlan, collapse_model
from tests.collapse.helpers import ALL_KEPT, scramble


@pytest.fixture(scope="module")
def nine(tiny_llama: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    """Nine layers; tests work on copies."""
    return scramble(tiny_llama(layers=9), seed=20)


@pytest.fixture(scope="module")
def plan(nine: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase) -> CollapsePlan:
    """All three merges of the nine layers."""
    found = collapse_model(copy.deepcopy(nine), tiny_tokenizer, ALL_KEPT, source="tiny")[1]
    assert len(found.merges) == 3
    return found


@pytest.fixture(scope="module")
def written(plan: CollapsePlan) -> dict[str, Any]:
    """The plan as its file holds it; tests change copies."""
    values: dict[str, Any] = json.loads(json.dumps(plan.to_dict()))
    return values
