"""Each family of the table, on a tiny random model: collapse, reload, cache, training, adapters; and the refusals."""

import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from laco_train.collapse import CollapsePlan, collapse_model, decoder_of, families
from laco_train.collapse.families import FAMILIES, depth_of, families_table
from laco_train.errors import InputError
from laco_train.settings import CollapseSettings
from tests.collapse.helpers import RULES, TEXTS
from tests.collapse.tiny import (
    COMMON,
    DEPTH,
    HEADS,
    LLAMA,
    SLIDING,
    STANDINS,
    TINY,
    assert_sound,
    assert_takes_lora,
    assert_trains,
    logits,
    tiny,
)

ROOT = Path(__file__).parent.parent.parent
KINDS = [family.model_type for family in FAMILIES]
SUMMING = [rule for rule in RULES if rule != "drop"]
# Every window of two layers is kept: six layers become four, then three.
ALL_KEPT = CollapseSettings(layers_per_merge=2, similarity_threshold=-1.0, mixed_types="first", calibration=TEXTS)
BREAKING = [1, 4]  # leaves layers 0, 2, 3 and 5, of which no pattern above makes the right types


@pytest.fixture(autouse=True, scope="module")
def modules_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Remote code is copied to a folder of this session."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
        patch.setattr("sys.path", [folder, *__import__("sys").path])
        yield


def collapsed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **changes: Any) -> CollapsePlan:
    return collapse_model(model, tokenizer, dataclasses.replace(ALL_KEPT, **changes))[1]


def holds_experts(model: PreTrainedModel) -> bool:
    return any("expert" in name for name, _ in model.named_modules())


def exercise(kind: str, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """What a row of the table promises."""
    for rule in RULES:
        model = tiny(kind)
        if holds_experts(model) and rule in SUMMING:
            with pytest.raises(InputError, match=r"^collapse\.merge_rule: .*aligned.*use drop"):
                collapsed(model, tokenizer, merge_rule=rule)
            continue
        plan = collapsed(model, tokenizer, merge_rule=rule)
        assert [candidate.skipped for candidate in plan.candidates] == [None] * len(plan.candidates)
        assert_sound(model, folder / rule, plan.depth)
        assert plan.depth == 4


@pytest.mark.parametrize("kind", KINDS)
def test_every_rule(kind: str, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    exercise(kind, tiny_tokenizer, tmp_path)
