"""LoRA adapters, by peft."""

import warnings

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from laco_train.collapse import decoder_of
from laco_train.errors import InputError
from laco_train.settings import LoraSettings

ALL_LINEAR = "all-linear"
"""Target that stands for every linear layer but the head, in peft too."""


def attach_lora(model: PreTrainedModel, settings: LoraSettings) -> PeftModel:
    """Wrap `model` (already collapsed, else adapters name layers that go) with trainable adapters.

    Raises:
        InputError: a name in `settings.targets` is that of no module with a weight matrix, of one that peft can't
            adapt, or of an embedding that is the head too.
    """
    targets = [settings.targets] if isinstance(settings.targets, str) else settings.targets
    if targets != [ALL_LINEAR]:
        _refuse_unmatched(model, targets)
        _refuse_tied(model, targets)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=ALL_LINEAR if targets == [ALL_LINEAR] else targets,
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():
            # peft 0.21 reads the property that transformers 5.23 renames
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            wrapped = get_peft_model(model, config)
    except ValueError as error:  # a matrix of a module of another kind, such as a router's
        raise InputError("model.lora.targets", str(error).splitlines()[0]) from error
    assert isinstance(wrapped, PeftModel)
    return wrapped


def left_alone(model: PeftModel) -> str | None:
    """A line on the matrices of the layers that have no adapter, such as experts; None if all have one.

    Args:
        model: with adapters; its weights need not be at hand.
    """
    layers = decoder_of(model.get_base_model()).stack  # type: ignore[arg-type]
    frozen = {name: p.numel() for name, p in layers.named_parameters() if p.ndim > 1 and _is_own_weight(name)}
    alone = {name: size for name, size in frozen.items() if ".base_layer." not in name}
    if not alone:
        return None
    modules = sorted({name.split(".")[-2] for name in alone})
    share = 100 * sum(alone.values()) / sum(frozen.values())
    return f"LoRA adapts no weights of {', '.join(modules)}: {share:.0f}% of those in the layers' matrices don't train."


def _is_own_weight(name: str) -> bool:
    return ".lora_" not in name and not name.endswith("bias")


def _refuse_unmatched(model: PreTrainedModel, targets: list[str]) -> None:
    # peft matches whole names or their ends, and is silent if only some of several targets match
    matrices = [name.removesuffix(".weight") for name, p in model.named_parameters() if p.ndim == 2]
    for target in targets:
        if not any(_matches(name, target) for name in matrices):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in matrices}))
            raise InputError("model.lora.targets", f"{target} matches no module; this model has {known}")


def _refuse_tied(model: PreTrainedModel, targets: list[str]) -> None:
    # an adapter acts on the way in alone, but merged it would change the head as well
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        return
    name = next(name for name, module in model.named_modules() if module is embedding)
    for target in targets:
        if _matches(name, target):
            raise InputError(
                "model.lora.targets",
                f"{target} is the head too in this model, so that a merged adapter would change both; leave it out",
            )


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
