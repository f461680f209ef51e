"""The collapsed model fitted to the original: windows alone, then all together."""

import copy
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from laco_train.collapse import CollapsePlan, apply_plan, collapse_model
from laco_train.errors import InputError
from laco_train.refine import Place, Window, refine, windows_of
from laco_train.refine.refinement import _descend
from laco_train.settings import CollapseSettings, RefineSettings
from laco_train.training.loss import Batch
from tests.collapse.helpers import TEXTS, assert_same_weights, scramble

Llama = Callable[..., LlamaForCausalLM]
PLACE = Place(torch.device("cpu"), nullcontext)
DROPPED = CollapseSettings(remove=[2, 3, 5], calibration=TEXTS)
MERGED = CollapseSettings(layers_per_merge=2, similarity_threshold=-1.0, lowest_layer=2, calibration=TEXTS)
SETTINGS = RefineSettings(tokens=80 * 48, windows=0.5, batch_size=2, learning_rate=1e-3)


def some_batches(count: int) -> list[Batch]:
    """Blocks of 24 tokens, two a batch, each of documents of ten."""
    ids = torch.randint(5, 90, (count, 2, 24), generator=torch.Generator().manual_seed(3))
    positions = torch.arange(24).remainder(10).expand(2, 24)
    return [{"input_ids": rows, "labels": rows, "position_ids": positions} for rows in ids]


@pytest.fixture
def original(tiny_llama: Llama) -> LlamaForCausalLM:
    model: LlamaForCausalLM = scramble(tiny_llama(layers=7), seed=2)
    return model


def collapsed_by(
    settings: CollapseSettings, original: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> tuple[LlamaForCausalLM, CollapsePlan]:
    return collapse_model(copy.deepcopy(original), tokenizer, settings, source="tiny")  # type: ignore[return-value]


@torch.no_grad()
def divergence(original: LlamaForCausalLM, model: LlamaForCausalLM, batches: list[Batch]) -> float:
    """Mean KL over all positions, by torch's own function."""
    total = 0.0
    for batch in batches:
        call = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
        p, q = (each(**call).logits.log_softmax(-1).flatten(0, 1) for each in (original, model))
        total += float(kl_div(q, p, log_target=True, reduction="batchmean"))
    return total / len(batches)


def test_windows_are_layers_that_stand_for_several(
    original: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    _, plan = collapsed_by(DROPPED, original, tiny_tokenizer)
    assert windows_of(plan) == (Window(1, 1, 3), Window(2, 4, 5))


def test_a_dropped_first_layer_has_no_layer_that_stands_for_it(
    original: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    _, plan = collapsed_by(CollapseSettings(remove=[0, 6]), original, tiny_tokenizer)
    assert windows_of(plan) == (Window(4, 5, 6),)


# every merge rule, and layers that a strategy has fitted already
STARTS = {
    "dropped": DROPPED,
    **{rule: replace(MERGED, merge_rule=rule) for rule in ("rdsc", "last", "mean", "drop")},
    "streamline": CollapseSettings(strategy="streamline", target_depth=4, similarity_threshold=None, calibration=TEXTS),
}


@pytest.mark.parametrize("settings", STARTS.values(), ids=STARTS)
def test_it_comes_nearer_to_the_original(
    settings: CollapseSettings, original: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    """On blocks that it did not see."""
    model, plan = collapsed_by(settings, original, tiny_tokenizer)
    batches, others = some_batches(30)[:20], some_batches(30)[20:]
    before = divergence(original, model, others)
    untouched = copy.deepcopy(original)
    refined = refine(original, model, plan, batches, SETTINGS, PLACE)
    assert divergence(original, model, others) < 0.7 * before
    assert_same_weights(original, untouched)
    fitted = 0 if plan.refined is None else plan.refined.tokens  # by the strategy
    assert refined.refined is not None and refined.refined.tokens == fitted + 80 * 48
    assert refined.refinement.tokens == 80 * 48
    assert 0 < refined.refinement.seconds <= refined.refined.seconds
    assert not model.training


def test_windows_alone_change_their_last_projections_alone(
    original: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    model, plan = collapsed_by(DROPPED, original, tiny_tokenizer)
    before = copy.deepcopy(model.state_dict())
    refine(original, model, plan, some_batches(20), replace(SETTINGS, windows=1.0), PLACE)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2)}


def test_the_plan_and_its_file_give_the_same_weights(
    original: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model, plan = collapsed_by(MERGED, original, tiny_tokenizer)
    refined = refine(original, model, plan, some_batches(4), replace(SETTINGS, tokens=8 * 48), PLACE)
    refined.save(tmp_path / "collapse_plan.json")
    loaded = CollapsePlan.load(str(tmp_path / "collapse_plan.json"))
    again = apply_plan(copy.deepcopy(original), loaded)
    assert_same_weights(again, model)
    assert loaded.lineage == plan.lineage and loaded.merges == plan.merges


@pytest.mark.parametrize("asked", [0, 96], ids=["fitted by the strategy alone", "refined"])
def test_files_of_before_say_by_their_settings_what_was_refinement(
    asked: int, original: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    _, plan = collapsed_by(replace(STARTS["streamline"], refine=RefineSettings(tokens=asked)), original, tiny_tokenizer)
    assert plan.refined is not None and plan.refined.tokens > 0
    assert plan.refinement.tokens == 0
    assert CollapsePlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    values = plan.to_dict()
    del values["refined"]["refinement"]
    assert CollapsePlan.from_dict(values).refinement.tokens == (plan.refined.tokens if asked else 0)


def test_a_plan_refined_again_has_the_sum(original: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """Though its settings ask for none: those are of the search."""
    model, plan = collapsed_by(DROPPED, original, tiny_tokenizer)
    assert plan.refinement.tokens == 0
    for round_ in (1, 2):
        plan = refine(original, model, plan, some_batches(4), replace(SETTINGS, tokens=3 * 48), PLACE)
        assert plan.refinement.tokens == round_ * 3 * 48
    assert plan.refined is not None and plan.refined.tokens == 6 * 48


def test_the_same_batches_give_the_same_weights(
    original: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    weights: list[dict[str, Tensor]] = []
    for _ in range(2):
        model, plan = collapsed_by(DROPPED, original, tiny_tokenizer)
        refine(original, model, plan, some_batches(4), replace(SETTINGS, tokens=6 * 48), PLACE)
        weights.append(model.state_dict())
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_fewer_tokens_than_a_batch_are_refused(
    original: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    model, plan = collapsed_by(DROPPED, original, tiny_tokenizer)
    with pytest.raises(InputError, match=r"collapse\.refine\.tokens"):
        refine(original, model, plan, some_batches(1), replace(SETTINGS, tokens=47), PLACE)


def test_a_rate_that_explodes_is_told(original: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    model, plan = collapsed_by(DROPPED, original, tiny_tokenizer)
    with pytest.raises(InputError, match=r"collapse\.refine\.learning_rate"):
        refine(original, model, plan, some_batches(4), replace(SETTINGS, learning_rate=1e30), PLACE)


@pytest.mark.parametrize(("windows", "refused"), [(0.0, True), (0.5, True), (1.0, False)])
def test_float16_does_not_descend(
    windows: float, refused: bool, original: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    """It is told before anything is solved; what is solved alone has no AdamW."""
    original.half()
    model, plan = collapsed_by(DROPPED, original, tiny_tokenizer)
    before = copy.deepcopy(model.state_dict())
    settings = replace(SETTINGS, windows=windows)
    if not refused:
        refine(original, model, plan, some_batches(4), settings, PLACE)
        assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
        return
    with pytest.raises(InputError, match=r"^trainer\.precision: would train weights in float16"):
        refine(original, model, plan, some_batches(4), settings, PLACE)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("windows", [0.0, 0.5, 1.0])
def test_time_ends_it(windows: float, original: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    """One batch is read in any case."""
    model, plan = collapsed_by(DROPPED, original, tiny_tokenizer)
    settings = replace(SETTINGS, seconds=1e-9, windows=windows)
    refined = refine(original, model, plan, some_batches(4), settings, PLACE)
    assert refined.refined is not None and refined.refined.tokens == 48


@pytest.mark.parametrize(("broken", "ends_well"), [(9, True), (10, False)])
def test_ten_steps_in_a_row_without_finite_gradients_are_told(broken: int, ends_well: bool) -> None:
    """Though the last loss is a number again."""
    layer = torch.nn.Linear(2, 2)
    losses = iter([float("nan")] * broken + [1.0])

    def loss(batch: Batch) -> Tensor:
        return layer.weight.sum() * next(losses)

    batches = iter([{"input_ids": torch.zeros(1)}] * (broken + 1))
    if ends_well:
        assert _descend(layer, loss, batches, broken + 1, 1e-3, PLACE, None) == broken + 1
        return
    with pytest.raises(InputError, match=r"collapse\.refine\.learning_rate"):
        _descend(layer, loss, batches, broken + 1, 1e-3, PLACE, None)
