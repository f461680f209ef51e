"""LoRA adapters, by peft."""

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from laco_train.errors import InputError
from laco_train.settings import LoraSettings


def attach_lora(model: PreTrainedModel, settings: LoraSettings) -> PeftModel:
    """Wrap `model` (already collapsed, else adapters name layers that go) with trainable adapters.

    Raises:
        InputError: no module has a name in `settings.targets`.
    """
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.targets,
        task_type="CAUSAL_LM",
    )
    try:
        wrapped = get_peft_model(model, config)
    except ValueError as error:
        if "arget module" not in str(error):
            raise
        names = sorted({name.rpartition(".")[2] for name, _ in model.named_modules() if ".layers." in f".{name}."})
        raise InputError(
            "model.lora.targets", f"{settings.targets} matches no module; this model has {', '.join(names)}"
        ) from None
    assert isinstance(wrapped, PeftModel)
    return wrapped
