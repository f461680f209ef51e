"""Operations of training a token, against numbers computed by hand, and against what PyTorch counts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from laco_train.callbacks.utilisation import trained
from laco_train.settings import LoraSettings, ModelSettings
from laco_train.training.flops import Trained, flops_per_token, mean_attended
from laco_train.training.matmul import arithmetic_dtype, matmul_rate
from laco_train.training.module import CausalLM
from tests.collapse.tiny import tiny


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ([[0, 1, 2, 3]], 4.0),
        ([[0, 0, 0, 0]], 1.0),
        ([[0, 1, 2, 0], [0, 1, 0, 1]], (9 + 1 + 4 + 4) / 8),
        ([[0, 1, 2, 3], [0, 1, 2, 3]], 4.0),  # a document does not go on over a block's end
        ([[0, 0, 1, 2]], (1 + 9) / 4),
    ],
)
def test_mean_attended_weighs_documents_by_their_tokens(positions: list[list[int]], expected: float) -> None:
    assert mean_attended(np.array(positions, np.int32)) == pytest.approx(expected)


def test_mean_attended_of_long_blocks_does_not_overflow() -> None:
    assert mean_attended(np.tile(np.arange(100_000, dtype=np.int32), (2, 1))) == 100_000


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        # 6 * 1000 + 6 * 4 * 8 * 10
        (Trained(layers=4, width=8, parameters=1000, trainable=1000), 6000 + 1920),
        # LoRA: 4 * 1000 + 2 * 50 + 6 * 4 * 8 * 10
        (Trained(layers=4, width=8, parameters=1000, trainable=50), 4000 + 100 + 1920),
        # the upper of four layers: 2 * 1000 + 2 * 300 + 2 * 300 + (2 * 4 + 4 * 1) * 8 * 10
        (
            Trained(layers=4, width=8, parameters=1000, trainable=300, frozen_layers=3, frozen_below=700),
            2000 + 600 + 600 + 960,
        ),
    ],
)
def test_operations_by_hand(model: Trained, expected: float) -> None:
    assert flops_per_token(model, 10.0) == pytest.approx(expected)


@pytest.fixture
def module(tiny_folder: Callable[..., Path]) -> Callable[..., CausalLM]:
    """Factory of modules of three layers with their model loaded."""

    def build(tied: bool = False, **settings: Any) -> CausalLM:
        made = CausalLM(ModelSettings(source=str(tiny_folder(layers=3, tie_word_embeddings=tied)), **settings), FLOAT32)
        made.configure_model()
        made.setup("fit")
        return made

    return build


FLOAT32 = torch.float32
LAYER = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32  # q, o; k, v; the MLP; two norms
TABLE = 320 * 32


def test_what_trains_of_a_whole_model(module: Callable[..., CausalLM]) -> None:
    whole = 3 * LAYER + 2 * TABLE + 32
    assert trained(module()) == Trained(layers=3, width=32, parameters=whole, trainable=whole)


def test_tied_embeddings_count_once(module: Callable[..., CausalLM]) -> None:
    assert trained(module(tied=True)).parameters == 3 * LAYER + TABLE + 32


def test_what_trains_with_lora(module: Callable[..., CausalLM]) -> None:
    seen = trained(module(method="lora", lora=LoraSettings(rank=2, targets=["q_proj"])))
    adapters = 3 * 2 * (32 + 32)
    assert seen == Trained(3, 32, 3 * LAYER + 2 * TABLE + 32 + adapters, trainable=adapters)


def test_what_trains_of_the_last_layer(module: Callable[..., CausalLM]) -> None:
    assert trained(module(method="last_layers", last_layers=1)) == Trained(
        layers=3,
        width=32,
        parameters=3 * LAYER + 2 * TABLE + 32,
        trainable=LAYER + TABLE + 32,
        frozen_layers=2,
        frozen_below=2 * LAYER + TABLE,
    )


def test_a_tied_head_is_reached(module: Callable[..., CausalLM]) -> None:
    seen = trained(module(tied=True, method="last_layers", last_layers=1))
    assert (seen.frozen_layers, seen.frozen_below, seen.trainable) == (2, 2 * LAYER, LAYER + TABLE + 32)


def of(model: Any) -> Trained:
    """`trained` of a module that holds `model`."""
    made = CausalLM(ModelSettings(source="none"), FLOAT32)
    made.model = model
    return trained(made)


def test_heads_may_be_wider_than_the_model() -> None:
    assert of(tiny("qwen3", head_dim=32)).width == 4 * 32
    assert of(tiny("gpt2")).width == 32


@pytest.mark.parametrize(("kind", "taken", "there"), [("mixtral", 2, 4), ("gpt_oss", 2, 4), ("qwen3_moe", 2, 4)])
def test_experts_count_as_far_as_a_token_takes_them(kind: str, taken: int, there: int) -> None:
    model = tiny(kind)
    held = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    whole = sum(p.numel() for p in model.parameters())
    assert held > 0
    assert of(model).parameters == of(model).trainable == whole - held + held * taken // there


@pytest.mark.parametrize("trained_layers", [1, 2, 3])
def test_products_are_what_pytorch_counts(module: Callable[..., CausalLM], trained_layers: int) -> None:
    made = module(method="last_layers", last_layers=trained_layers)
    made.lm.set_attn_implementation("eager")  # type: ignore[operator]
    ids = torch.arange(64).reshape(1, 64)
    with FlopCounterMode(display=False) as counter:
        made.lm(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    seen = trained(made)
    # a plain kernel computes both halves of the square; tables are looked up and norms scale, neither is a product
    no_products = (2 if trained_layers < 3 else 4) * TABLE + 32 * (2 * 7 + 4 * (2 * trained_layers + 1))
    angles = counter.get_total_flops() / 64 - (flops_per_token(seen, 2 * 64) - no_products)
    # rotary angles are 4 products in some versions of Transformers (5.17), and none in others (5.23)
    assert angles == pytest.approx(0, abs=0.1) or angles == pytest.approx(2 * 4, abs=0.1)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("32-true", torch.float32),
        ("bf16-mixed", torch.bfloat16),
        ("bf16-true", torch.bfloat16),
        ("16-mixed", torch.float16),
        ("64-true", torch.float32),
    ],
)
def test_type_of_the_products(precision: str, dtype: torch.dtype) -> None:
    assert arithmetic_dtype(precision) == dtype


def test_measuring_leaves_the_random_state() -> None:
    before = torch.get_rng_state()
    assert 1e7 < matmul_rate(torch.device("cpu"), torch.bfloat16, size=32) < 1e14
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_measuring_on_a_gpu_leaves_no_trace() -> None:
    device = torch.device("cuda")
    torch.mm(*(torch.ones(8, 8, device=device, dtype=torch.bfloat16) for _ in range(2)))  # workspaces are there
    before, allocated = torch.cuda.get_rng_state(), torch.cuda.memory_allocated()
    assert 1e12 < matmul_rate(device, torch.bfloat16) < 1e16
    assert torch.cuda.memory_allocated() == allocated
    assert torch.equal(torch.cuda.get_rng_state(), before)
