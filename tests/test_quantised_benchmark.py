"""benchmarks/quantised.py moves weights by what rounding to four bits does, and no further."""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))  # its scripts import each other by name

from quantised import BLOCK, rounded_again  # noqa: E402


def test_each_weight_moves_by_half_a_step_at_most(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    before, after, other = tiny_llama(layers=2), tiny_llama(layers=2), tiny_llama(layers=2)
    rounded_again(after, 1)
    rounded_again(other, 2)
    moved = 0
    for (name, one), two in zip(before.named_parameters(), after.parameters(), strict=True):
        if "norm" in name or "embed" in name or "lm_head" in name:
            assert torch.equal(one, two)
            continue
        moved += 1
        blocks, apart = (x.detach().view(len(one), -1, BLOCK) for x in (one, two - one))
        step = (blocks.amax(-1) - blocks.amin(-1)) / 15
        share = apart.abs().amax(-1) / step
        assert float(share.min()) > 0.3 and float(share.max()) < 0.501
        assert not torch.equal(two, other.get_parameter(name))
    assert moved == 2 * 7
