"""What the device could do, measured in this process before training, and the share of it that training uses."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from peft import PeftModel

from laco_train.collapse import decoder_of
from laco_train.training.data import PackedText
from laco_train.training.flops import Trained, flops_per_token, mean_attended
from laco_train.training.matmul import arithmetic_dtype, matmul_rate
from laco_train.training.module import CausalLM

_SAMPLED_BLOCKS = 1024


class Utilisation(Callback):
    """Measures the rate of matrix products, and counts the operations of training a token.

    Attributes:
        rate: operations per second of matrix products over all devices; 0 before training, and on devices other than
            CPUs and CUDA.
        flops_per_token: operations of training a token, see `laco_train.training.flops`.
        earlier_peak: bytes allocated at most on the CUDA device before training.
    """

    def __init__(self) -> None:
        self.rate = 0.0
        self.flops_per_token = 0.0
        self.earlier_peak = 0

    def mfu(self, tokens_per_second: float) -> float | None:
        """Share of the rate that training at this speed uses; None if no rate was measured."""
        return self.flops_per_token * tokens_per_second / self.rate if self.rate else None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Model and data are ready, and nothing else runs on the device."""
        assert isinstance(pl_module, CausalLM)
        device, dtype = trainer.strategy.root_device, arithmetic_dtype(str(trainer.precision))
        data: PackedText = trainer.datamodule  # type: ignore[attr-defined]
        self.flops_per_token = flops_per_token(trained(pl_module), sampled_attended(data))
        if device.type not in ("cpu", "cuda"):
            return
        if device.type == "cuda":
            self.earlier_peak = torch.cuda.max_memory_allocated(device)
        self.rate = matmul_rate(device, dtype) * trainer.world_size
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # the peak of training begins here
        if trainer.is_global_zero:
            of = "" if trainer.world_size == 1 else f" over {trainer.world_size} devices"
            print(f"Matrix products: {_per_second(self.rate)} in {str(dtype).removeprefix('torch.')}{of}", flush=True)


def trained(module: CausalLM) -> Trained:
    """What of the module's model trains; a teacher beside it does not count."""
    model = module.lm
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    decoder = decoder_of(base)
    trains = [any(p.requires_grad for p in layer.parameters()) for layer in decoder.stack]
    frozen = trains.index(True) if True in trains else decoder.depth
    below = {p for layer in decoder.stack[:frozen] for p in layer.parameters()}
    if frozen:  # a tied table is the head too, which gradients reach
        head = base.get_output_embeddings()
        below |= set(base.get_input_embeddings().parameters()) - set(head.parameters())
    config = base.config.get_text_config()
    share = _share_of_experts(config)
    sizes = {p: p.numel() * (share if ".experts." in name else 1.0) for name, p in model.named_parameters()}
    return Trained(
        layers=decoder.depth,
        width=_width_of_attention(config),
        parameters=round(sum(sizes.values())),
        trainable=round(sum(size for p, size in sizes.items() if p.requires_grad)),
        frozen_layers=frozen,
        frozen_below=round(sum(sizes[p] for p in below)),
    )


def _width_of_attention(config: Any) -> int:
    """Query heads times the size of one; the model's width where the config does not tell heads as one number."""
    heads, size = getattr(config, "num_attention_heads", None), getattr(config, "head_dim", None)
    return heads * size if isinstance(heads, int) and isinstance(size, int) else config.hidden_size


def _share_of_experts(config: Any) -> float:
    """How many of a layer's experts a token takes; 1 without experts."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((count for name in names if (count := getattr(config, name, None))), None)
    taken = getattr(config, "num_experts_per_tok", None)
    return taken / experts if experts and taken else 1.0


def sampled_attended(data: PackedText) -> float:
    """T of the training blocks, by some thousand of them spread over all; see `mean_attended`."""
    blocks = data.train_blocks
    sample = blocks.select(range(0, len(blocks), max(1, len(blocks) // _SAMPLED_BLOCKS)))
    return mean_attended(sample[:]["position_ids"])


def _per_second(rate: float) -> str:
    return f"{rate / 1e12:,.0f} TFLOP/s" if rate >= 1e13 else f"{rate / 1e9:,.0f} GFLOP/s"
