"""LoRA adapters, by peft."""

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from laco_train.errors import InputError
from laco_train.settings import LoraSettings

ALL_LINEAR = "all-linear"
"""Target that stands for every linear layer but the head, in peft too."""


def attach_lora(model: PreTrainedModel, settings: LoraSettings) -> PeftModel:
    """Wrap `model` (already collapsed, else adapters name layers that go) with trainable adapters.

    Raises:
        InputError: a name in `settings.targets` is that of no module with a weight matrix.
    """
    targets = [settings.targets] if isinstance(settings.targets, str) else settings.targets
    if targets != [ALL_LINEAR]:
        _refuse_unmatched(model, targets)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=ALL_LINEAR if targets == [ALL_LINEAR] else targets,
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(model, config)
    assert isinstance(wrapped, PeftModel)
    return wrapped


def _refuse_unmatched(model: PreTrainedModel, targets: list[str]) -> None:
    # peft matches whole names or their ends, and is silent if only some of several targets match
    matrices = [name.removesuffix(".weight") for name, p in model.named_parameters() if p.ndim == 2]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in matrices):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in matrices}))
            raise InputError("model.lora.targets", f"{target} matches no module; this model has {known}")
