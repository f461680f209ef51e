"""Random models and settings that the tests of the collapse share."""

from dataclasses import dataclass
from typing import TypeVar

import torch
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedTokenizerBase

from laco_train.settings import CollapseSettings

RULES = ("rdsc", "last", "mean", "drop")
TEXTS = [
    "The river rises in the northern hills and flows south through three old towns.",
    "A tokenizer splits text into pieces.",
    "She had been a friend and companion such as few possessed: intelligent, well-informed, useful.",
    "Sea",
]

# Nine layers become three: the pointer stands at layers 5, 3 and 1, from 0.
ALL_KEPT = CollapseSettings(layers_per_merge=3, min_interval=1, similarity_threshold=-1.0, calibration=TEXTS)

M = TypeVar("M", bound=nn.Module)


@torch.no_grad()
def scramble(model: M, seed: int) -> M:
    """Fill `model`, in place, with random weights of which no two norms are alike (a fresh Llama's are all 1)."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.15 * noise)
    return model


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[torch.Tensor]:
    """Each text alone as ids of shape [tokens]."""
    return [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]


def assert_same_weights(a: torch.nn.Module, b: torch.nn.Module) -> None:
    """Every tensor, bit for bit."""
    mine, theirs = a.state_dict(), b.state_dict()
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


@dataclass(frozen=True)
class Case:
    """One drawn search: the model's depth and seed, Algorithm 1's letters and the samples."""

    depth: int
    seed: int
    C: int
    L: int
    H: int
    I: int  # noqa: E741
    T: float
    texts: tuple[str, ...]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Every valid combination for depths 3 to 9; one to four samples of different lengths."""
    depth = draw(st.integers(3, 9))
    C = draw(st.integers(2, min(5, depth - 1)))
    H = draw(st.integers(C + 1, depth))
    L = draw(st.integers(1, H - C))
    texts = draw(st.lists(st.sampled_from(TEXTS), min_size=1, max_size=4, unique=True))
    seed, interval, threshold = draw(st.integers(0, 999)), draw(st.integers(1, 4)), draw(st.floats(-0.2, 1))
    return Case(depth, seed, C, L, H, interval, threshold, tuple(texts))
