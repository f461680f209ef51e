"""The fast way to the same losses: fused kernels, compiled layers, attention by documents (issue 5, Speed).

What a model can't do is found out by trying on a few blocks, and left to Transformers' own code.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn

from laco_train.errors import InputError
from laco_train.settings import SpeedSettings
from laco_train.training.attention import set_document_attention
from laco_train.training.bf16_adamw import has_triton
from laco_train.training.linear_loss import Head, linear_loss
from laco_train.training.loss import Batch, base_of, causal_lm_loss, model_inputs, next_tokens
from laco_train.training.parallel import as_forward

Loss = Callable[[nn.Module, Batch], Tensor]
# Two ways of rounding in half precision differ by less; a missing mask or cap differs by more. Relative, or nats.
_TOLERANCE = 0.02
# Nats up to which it is absolute: a model that is much collapsed has losses of 20, and rounds as much coarser.
_ORDINARY_LOSS = 3.0
# Logits of a probe are made so many times larger: a cap leaves small ones as they are.
_ENLARGED = 256


@dataclass(frozen=True)
class Kernels:
    """What was chosen.

    Attributes:
        attention: attention by documents on a flash kernel.
        loss: logits never stored.
        compiled: layers compiled, each on its own.
        reasons: why something was left to Transformers.
    """

    attention: bool = False
    loss: bool = False
    compiled: bool = False
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        names = {"attention by documents": self.attention, "loss without logits": self.loss, "layers": self.compiled}
        fused = [name for name, chosen in names.items() if chosen]
        if not fused:
            return f"Transformers' own ({'; '.join(self.reasons)})" if self.reasons else "Transformers' own"
        left = f" ({'; '.join(self.reasons)})" if self.reasons else ""
        return f"fused: {', '.join(fused)}{left}"


PLAIN = Kernels()


def fused_loss(model: nn.Module, batch: Batch) -> Tensor:
    """What `causal_lm_loss` gives, without storing logits; the head must be a plain linear map."""

    def work() -> Tensor:
        head = head_of(model, batch)
        with without_autocast():
            return linear_loss(head.hidden, head.weight, next_tokens(batch).flatten(), compiled=True)

    return as_forward(model, work)


def head_of(model: nn.Module, batch: Batch) -> Head:
    """What the logits of `batch` are made of, by the layers' own forward pass; see `_plain_head`."""
    base = base_of(model)
    states = base.base_model(**model_inputs(model, batch)).last_hidden_state.flatten(0, 1)
    # autocast's matrix products take this type anyway
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else states.dtype
    return Head(states.to(dtype), base.get_output_embeddings().weight)


def without_autocast() -> AbstractContextManager[Any]:
    """For arithmetic on a `Head`, which has its types."""
    return torch.autocast("cuda", enabled=False)


def check_kernels(settings: SpeedSettings, device: torch.device) -> None:
    """Refuse fused kernels where there is no GPU with Triton."""
    if settings.kernels == "fused" and (missing := _missing(device)):
        raise InputError("speed.kernels", f"fused needs {missing}; say auto or plain")


def choose(
    model: nn.Module,
    settings: SpeedSettings,
    strategy: Strategy,
    probe: Batch,
    context: Callable[[], AbstractContextManager[None]],
) -> tuple[Kernels, Loss]:
    """Switch the attention of `model` if that can be done, and say what else can.

    Args:
        model: collapsed, with its adapters, in training mode; or a frozen teacher in eval mode; on its device.
        probe: a block or two, on that device.
        context: the precision under which the model trains.

    Raises:
        InputError: speed.kernels is fused, and there is no GPU with Triton.
    """
    check_kernels(settings, strategy.root_device)
    if settings.kernels == "plain" or _missing(strategy.root_device):
        return PLAIN, causal_lm_loss
    reasons: list[str] = []
    with torch.no_grad(), context():
        expected = causal_lm_loss(model, probe)
        attention = _half_precision(model, reasons) and same_loss(
            model, probe, expected, causal_lm_loss, attention=True, reasons=reasons
        )
        loss = (
            _wide_enough(model, reasons)
            and _plain_head(model, probe, reasons)
            and same_loss(model, probe, expected, fused_loss, attention=attention, reasons=reasons)
        )
    return Kernels(attention, loss, True, tuple(reasons)), fused_loss if loss else causal_lm_loss


def _missing(device: torch.device) -> str:
    """What fused kernels lack here; empty if nothing."""
    if device.type != "cuda":
        return "a GPU"
    return "" if has_triton() else "Triton"


def _half_precision(model: nn.Module, reasons: list[str]) -> bool:
    if torch.is_autocast_enabled("cuda") or next(model.parameters()).dtype != torch.float32:
        return True
    reasons.append("attention: by documents in half precision only")
    return False


def _wide_enough(model: nn.Module, reasons: list[str]) -> bool:
    narrow = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else next(model.parameters()).dtype
    if narrow != torch.float16:
        return True
    reasons.append("loss: gradients by logits, divided by the number of tokens, are too small for float16")
    return False


def same_loss(
    model: nn.Module, probe: Batch, expected: Tensor, loss: Loss, *, attention: bool, reasons: list[str]
) -> bool:
    """Whether `loss` gives what is expected, and gradients; the attention is left switched on only then.

    Args:
        reasons: why not is added to these.
    """
    what = "attention" if loss is causal_lm_loss else "loss"
    set_document_attention(model, attention)
    try:
        with torch.enable_grad():
            found = loss(model, probe)
            if any(p.requires_grad for p in model.parameters()):  # not those of a teacher
                found.backward()  # a kernel may fit the GPU in one direction only
        differs = not abs(float(found) - float(expected)) <= tolerated(float(expected))  # NaN does
        reason = f"{what} would differ by {abs(float(found) - float(expected)):.3f} nats" if differs else ""
    except torch.OutOfMemoryError:  # says nothing of what the model can do, and ends in advice
        raise
    except Exception as error:  # compilers have errors of many types, not all of them RuntimeError
        reason = f"{what}: {(str(error).splitlines() or [type(error).__name__])[0][:100]}"
    finally:
        model.zero_grad(set_to_none=True)
    if reason:
        reasons.append(reason)
        if what == "attention":
            set_document_attention(model, False)
    return not reason


def tolerated(loss: float) -> float:
    """Nats by which two ways to the same loss may differ."""
    return _TOLERANCE * max(1.0, loss / _ORDINARY_LOSS)


def _plain_head(model: nn.Module, probe: Batch, reasons: list[str]) -> bool:
    """Whether logits are the last hidden states times the head's weights and nothing else."""
    base = base_of(model)
    head: Any = base.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        reasons.append("loss: the head is no plain linear map")
        return False
    inputs = model_inputs(model, probe)
    enlarging = head.register_forward_hook(lambda module, args, logits: _ENLARGED * logits)
    try:
        logits = model(**inputs).logits.float()
    finally:
        enlarging.remove()

    def product_with_states() -> Tensor:
        return nn.functional.linear(base.base_model(**inputs).last_hidden_state, head.weight)

    product = _ENLARGED * as_forward(model, product_with_states).float()
    if float((logits - product).norm()) > _TOLERANCE * float(product.norm()):
        reasons.append("loss: the model does more to its logits")
        return False
    return True
