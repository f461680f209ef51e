"""The fast way to the same losses for the time of a refinement; training chooses anew, as its shapes are others."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from lightning.pytorch.strategies import Strategy
from transformers import PreTrainedModel

from laco_train.collapse import decoder_of
from laco_train.refine.refinement import by_logits
from laco_train.settings import SpeedSettings
from laco_train.training.attention import set_document_attention
from laco_train.training.data import PackedText, collate
from laco_train.training.fused import choose
from laco_train.training.fused_distill import DistillStep, Trial
from laco_train.training.layers import arrange_layers


@contextmanager
def refining(
    collapsed: PreTrainedModel,
    original: PreTrainedModel,
    speed: SpeedSettings,
    strategy: Strategy,
    data: PackedText,
    context: Callable[[], AbstractContextManager[Any]],
    *,
    together: bool,
) -> Iterator[DistillStep]:
    """Attention by documents in both models and compiled layers in `collapsed`, as far as `speed` and the device allow.

    Gives the fastest way to the divergence of the two. The original's layers stay as they are: their hooks, each
    another, would have each compiled by itself.

    Args:
        together: whether that divergence is wanted; else no way to it is tried.
    """
    device = strategy.root_device
    probe = {name: rows.to(device) for name, rows in collate(data.validation_blocks.select(range(1))).items()}
    collapsed.train()
    kernels, _ = choose(collapsed, speed, strategy, probe, context)
    if kernels.attention:
        set_document_attention(original, True)
    stored = by_logits(original)
    divergence: DistillStep = stored
    if kernels.loss and together:  # before layers are compiled, as each shape is compiled for itself
        divergence, slow = Trial(collapsed, kernels, probe, context).without_logits(stored, original)
        if slow:
            print(f"Refinement with stored logits: {'; '.join(slow)}", flush=True)
    depth = len(decoder_of(collapsed).stack)
    arrange_layers(collapsed, compiled=kernels.compiled, recompute=depth if speed.checkpointing == "all" else 0)
    try:
        yield divergence
    finally:
        if kernels.attention:
            set_document_attention(collapsed, False)
        arrange_layers(collapsed, compiled=False, recompute=0)
        collapsed.eval()
