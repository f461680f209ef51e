"""The fast way gives the same losses as Transformers' own, and is left where it can't."""

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask, flex_attention
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from laco_train.errors import InputError
from laco_train.export import cpu_copy
from laco_train.settings import LoraSettings, SpeedSettings
from laco_train.training import attention, fused
from laco_train.training.adapters import attach_lora
from laco_train.training.attention import attends_by_documents, document_masks, set_document_attention
from laco_train.training.data import collate
from laco_train.training.fused import Kernels, fused_loss
from laco_train.training.layers import arrange_layers
from laco_train.training.loss import Batch, causal_lm_loss, model_inputs
from tests.cli.conftest import project
from tests.cli.runs import Project

__all__ = ["project"]

SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def batch_of(*blocks: list[int]) -> Batch:
    """Blocks of documents of such lengths; the first token of a document is no target."""
    values = np.random.default_rng(0)
    rows = []
    for lengths in blocks:
        positions = np.concatenate([np.arange(length) for length in lengths])
        ids = values.integers(320, size=len(positions))
        rows.append({"input_ids": ids, "labels": np.where(positions == 0, -100, ids), "position_ids": positions})
    return collate(rows)


BATCH = batch_of([9, 1, 14], [24], [3, 20, 1])


@given(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=5), min_size=1, max_size=4), st.integers(1, 8))
def test_masks_let_a_token_see_its_own_document(lengths: list[list[int]], window: int) -> None:
    size = max(sum(row) for row in lengths)
    batch = batch_of(*([*row, size - sum(row)] if sum(row) < size else row for row in lengths))
    positions = batch["position_ids"]
    masks = document_masks(positions, window)
    assert ("windowed" in masks) == (window < size)
    for name, mask in masks.items():
        seen = create_mask(mask.mask_mod, len(lengths), None, size, size, device="cpu")[:, 0]
        for block in range(len(lengths)):
            for q in range(size):
                first = q - int(positions[block, q])
                first = first if name == "documents" else max(first, q - window + 1)
                assert seen[block, q].nonzero().flatten().tolist() == list(range(first, q + 1))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=6), st.integers(1, 500))
def test_tiles_of_masks_are_those_of_the_whole_mask(lengths: list[int], window: int) -> None:
    positions = batch_of(lengths, [sum(lengths)])["position_ids"]
    size = positions.shape[1]
    for mask in document_masks(positions, window).values():
        whole = create_block_mask(mask.mask_mod, 2, None, size, size, device="cpu")
        assert mask.seq_lengths == whole.seq_lengths
        for kind in ("kv", "full_kv", "q", "full_q"):
            assert torch.equal(_tiles(mask, kind), _tiles(whole, kind))


def _tiles(mask: BlockMask, kind: str) -> Tensor:
    """Which tiles are listed, as a boolean tensor."""
    count, indices = getattr(mask, f"{kind}_num_blocks"), getattr(mask, f"{kind}_indices").long()
    listed = torch.arange(indices.shape[-1]) < count[..., None]
    return torch.zeros(indices.shape, dtype=torch.bool).scatter(-1, indices, listed)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flex attention without torch.compile: the same function, forward only on the CPU."""
    monkeypatch.setattr(attention, "_attend", flex_attention)


def make(kind: str, **options: Any) -> PreTrainedModel:
    """A tiny random model of a family."""
    made: dict[str, Callable[..., PreTrainedModel]] = {
        "llama": lambda c: LlamaForCausalLM(LlamaForCausalLM.config_class(**c)),
        "mistral": lambda c: MistralForCausalLM(MistralConfig(**{**c, "sliding_window": 5})),
        "qwen3": lambda c: Qwen3ForCausalLM(Qwen3Config(**c)),
        "gemma2": lambda c: Gemma2ForCausalLM(Gemma2Config(**c)),
        "cohere": lambda c: CohereForCausalLM(CohereConfig(**c)),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return made[kind]({**SIZES, **options}).float().train()


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "gemma2"])
def test_attention_by_documents_is_that_of_a_dense_mask(kind: str, adapted: bool) -> None:
    base = make(kind)
    model: Any = attach_lora(base, LoraSettings(rank=2)) if adapted else base
    with torch.no_grad():
        expected = model(**model_inputs(model, BATCH)).logits
        whole = {**BATCH, "position_ids": torch.arange(24).expand(3, 24)}
        leaking = model(**model_inputs(model, whole)).logits
        set_document_attention(model, True)
        assert attends_by_documents(model)
        found = model(**model_inputs(model, BATCH)).logits
        set_document_attention(model, False)
        assert not attends_by_documents(model)
        again = model(**model_inputs(model, BATCH)).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(again, expected)
    assert (leaking - expected).abs().max() > 0.1


@pytest.mark.usefixtures("kernel")
def test_sliding_window_matters() -> None:
    narrow, wide = make("mistral"), make("llama")
    wide.load_state_dict(narrow.state_dict())
    for model in (narrow, wide):
        set_document_attention(model, True)
    with torch.no_grad():
        one, other = (model(**model_inputs(model, BATCH)).logits for model in (narrow, wide))
    torch.testing.assert_close(one[1, :5], other[1, :5])
    assert (one[1, 6:] - other[1, 6:]).abs().max() > 0.01


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    "others", [{"dropout": 0.1}, {"sliding_window": 1}, {"s_aux": torch.zeros(4)}, {"documents": None}]
)
def test_what_is_not_covered_is_refused(others: dict[str, Any]) -> None:
    states = torch.zeros(1, 4, 2, 8)
    options = {**document_masks(torch.arange(2)[None], None), **others}
    with pytest.raises(NotImplementedError):
        attention.document_attention(nn.Module(), states, states, states, None, **options)


@pytest.fixture
def eager_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss without torch.compile, which only makes it faster."""
    plain = fused.linear_loss

    def eager(hidden: Tensor, weight: Tensor, labels: Tensor, *, compiled: bool) -> Tensor:
        return plain(hidden, weight, labels, compiled=False)

    monkeypatch.setattr(fused, "linear_loss", eager)


def loss_and_gradients(loss: fused.Loss, model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    value = loss(model, BATCH)
    value.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return value.detach(), gradients


@pytest.mark.usefixtures("eager_loss")
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_loss_without_logits_is_the_same(tied: bool, adapted: bool) -> None:
    base = make("llama", tie_word_embeddings=tied)
    model: Any = attach_lora(base, LoraSettings(rank=2)) if adapted else base
    expected, slopes = loss_and_gradients(causal_lm_loss, model)
    found, ours = loss_and_gradients(fused_loss, model)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert ours.keys() == slopes.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, slopes[name], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("eager_loss", "kernel")
@torch.no_grad()
def test_loss_without_logits_under_attention_by_documents() -> None:
    model = make("qwen3")
    expected = causal_lm_loss(model, BATCH)
    set_document_attention(model, True)
    found = fused_loss(model, BATCH)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "mistral"])
def test_plain_heads(kind: str) -> None:
    reasons: list[str] = []
    with torch.no_grad():
        assert fused._plain_head(make(kind), BATCH, reasons)
    assert reasons == []


def with_bias() -> nn.Module:
    model = make("llama")
    model.lm_head = nn.Linear(32, 320, bias=True)
    return model


def with_adapted_head() -> nn.Module:
    return attach_lora(make("llama"), LoraSettings(rank=2, targets=["lm_head"]))


@pytest.mark.parametrize(
    "build",
    [functools.partial(make, "gemma2"), functools.partial(make, "cohere"), with_bias, with_adapted_head],
    ids=["gemma2", "cohere", "bias", "adapter"],
)
def test_heads_that_do_more_are_found(build: Callable[[], nn.Module]) -> None:
    reasons: list[str] = []
    with torch.no_grad():
        assert not fused._plain_head(build(), BATCH, reasons)
    (reason,) = reasons
    assert reason.startswith("loss: ")


class OnCPU:
    """As much of a strategy as the choice looks at."""

    root_device = torch.device("cpu")


def test_choosing_fused_without_a_gpu_is_refused() -> None:
    with pytest.raises(InputError, match=r"^speed\.kernels: fused needs a GPU"):
        fused.choose(make("llama"), SpeedSettings(kernels="fused"), OnCPU(), BATCH, contextlib.nullcontext)  # type: ignore[arg-type]


def test_auto_is_plain_on_the_cpu() -> None:
    model = make("llama")
    kernels, loss = fused.choose(model, SpeedSettings(), OnCPU(), BATCH, contextlib.nullcontext)  # type: ignore[arg-type]
    assert loss is causal_lm_loss
    assert kernels == Kernels()
    assert str(kernels) == "Transformers' own"
    assert not attends_by_documents(model)
    assert all(layer._compiled_call_impl is None for layer in model.model.layers)


@pytest.mark.parametrize(
    ("kernels", "words"),
    [
        (
            Kernels(True, True, True),
            "fused: attention by documents, loss without logits, layers",
        ),
        (Kernels(loss=True, reasons=("attention: no",)), "fused: loss without logits (attention: no)"),
        (Kernels(reasons=("attention: no", "loss: no")), "Transformers' own (attention: no; loss: no)"),
    ],
)
def test_words(kernels: Kernels, words: str) -> None:
    assert str(kernels) == words


def test_fused_without_a_gpu_is_refused_before_anything_is_done(project: Project) -> None:
    before = project.files()
    result = project("fit", "--recipe", "tiny.yaml", "--speed.kernels", "fused")
    assert result.code == 2
    (line,) = (line for line in result.err.splitlines() if not line.startswith("INFO: "))
    assert "speed.kernels: fused needs a GPU" in line
    assert project.files() == before
    assert "Validation loss" not in result.out


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("adapted", [False, True])
def test_copy_for_the_cpu_is_free_of_all_of_it(adapted: bool, tmp_path: Path) -> None:
    base = make("llama")
    with torch.no_grad():
        expected = base(**model_inputs(base, BATCH)).logits
    model: Any = attach_lora(base, LoraSettings(rank=2)) if adapted else base
    set_document_attention(model, True)
    arrange_layers(model, compiled=True, recompute=2)
    duplicate = cpu_copy(model, torch.float32)
    assert not attends_by_documents(duplicate)
    assert all(layer._compiled_call_impl is None for layer in duplicate.model.layers)
    duplicate.save_pretrained(tmp_path)
    assert "laco" not in (tmp_path / "config.json").read_text()
    assert attention.NAME not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        for copied in (duplicate, loaded):
            torch.testing.assert_close(copied(**model_inputs(copied, BATCH)).logits, expected, rtol=1e-5, atol=1e-5)
    assert attends_by_documents(model)  # it goes on training
    assert all(layer._compiled_call_impl is not None for layer in base.model.layers)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gradients_by_logits_are_too_small_for_float16(dtype: torch.dtype) -> None:
    reasons: list[str] = []
    assert fused._wide_enough(make("llama").to(dtype), reasons) == (dtype != torch.float16)  # type: ignore[arg-type]
    assert len(reasons) == (dtype == torch.float16)


def test_memory_that_runs_out_in_the_trial_is_no_reason_to_fall_back() -> None:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        fused.same_loss(make("llama"), BATCH, torch.zeros(()), loss, attention=False, reasons=[])


class _FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        raise OSError("out of resource: shared memory")


def test_kernel_that_fails_in_the_backward_pass_is_left_out() -> None:
    model = make("llama")
    expected = causal_lm_loss(model, BATCH).detach()
    reasons: list[str] = []

    def fails(model: nn.Module, batch: Batch) -> Tensor:
        return _FailsBackward.apply(causal_lm_loss(model, batch))

    with torch.no_grad():
        assert not fused.same_loss(model, BATCH, expected, fails, attention=False, reasons=reasons)
        assert reasons == ["loss: out of resource: shared memory"]
        assert fused.same_loss(model, BATCH, expected, causal_lm_loss, attention=False, reasons=reasons)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("loss", "apart", "same"), [(3.25, 0.019, True), (3.25, 0.03, False), (20.66, 0.082, True)])
def test_rounding_of_a_large_loss_is_coarser(loss: float, apart: float, same: bool) -> None:
    """0.082 nats apart were two roundings of a model collapsed to 12 of 30 layers, whose loss was 20.66."""
    weight = nn.Parameter(torch.tensor(loss + apart))
    model = nn.Module()
    model.register_parameter("weight", weight)
    model.config = type("Config", (), {"_attn_implementation": "sdpa"})()
    reasons: list[str] = []
    found = fused.same_loss(model, {}, torch.tensor(loss), lambda m, b: 1 * m.weight, attention=False, reasons=reasons)
    assert found == same and bool(reasons) != same
