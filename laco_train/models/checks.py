"""Refuses, in one line each, what can't be collapsed: other kinds of model, and weights that aren't all there."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, __version__
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from laco_train.errors import InputError

SOURCE = "model.source"
REMOTE_CLASS = "AutoModelForCausalLM"
# what Transformers, safetensors and gguf raise over files that are damaged or made for another version
UNREADABLE = (OSError, ValueError, KeyError, ImportError, StrictDataclassError, SafetensorError, struct.error)
VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.tiktoken",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)


@contextmanager
def reading(part: str, source: str) -> Iterator[None]:
    """Turn an error over the `part` of `source` that is being read into an InputError."""
    try:
        yield
    except UNREADABLE as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise InputError(
            SOURCE, f"can't read the {part} of {source} ({reason}); copy or download it again, or update transformers"
        ) from error


def check_model_folder(folder: Path, source: str) -> None:
    """Refuse a folder without a config.json."""
    if (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").is_file():
        raise InputError(SOURCE, f"{source} holds a peft adapter, not a model; merge it into its base model first")
    raise InputError(SOURCE, f"{source} is no model folder: it has no config.json; name the folder that has one")


def check_weight_files(folder: Path, source: str) -> None:
    """Refuse a folder without safetensors weights."""
    if any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        return
    if any(folder.glob("pytorch_model*.bin")):
        raise InputError(SOURCE, pickled_only(source))
    raise InputError(SOURCE, f"{source} has a config.json but no weights (model.safetensors); copy them there")


def pickled_only(source: str) -> str:
    """What to do about a model whose weights are pickled."""
    load = f"from transformers import {REMOTE_CLASS} as M; M.from_pretrained({source!r}).save_pretrained('DIR')"
    return (
        f"{source} has no safetensors weights, and pickles (pytorch_model.bin) aren't read, as they can run code; "
        f'convert a model that you trust with `python -c "{load}"`, copy its tokenizer files to DIR, and name DIR'
    )


def check_tokenizer_files(folder: Path, source: str) -> None:
    """Refuse a folder without a vocabulary, of which Transformers would make an empty tokenizer."""
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise InputError(SOURCE, f"{source} holds no tokenizer (tokenizer.json); copy the tokenizer's files there")


def check_class_is_known(config: dict[str, Any], source: str, trust_remote_code: bool) -> None:
    """Refuse a config.json whose class neither Transformers nor code that may be run knows."""
    if config.get("model_type") in CONFIG_MAPPING:
        return
    if "auto_map" in config:
        if trust_remote_code:
            return
        raise InputError(
            "model.trust_remote_code",
            f"{source} needs Python code that comes with it; read that code, then set this to true if you trust it",
        )
    if "model_type" not in config:
        raise InputError(SOURCE, f"{source} is no Transformers model: its config.json names no model_type")
    raise InputError(
        SOURCE,
        f"{source} is of type {config['model_type']!r}, which Transformers {__version__} doesn't know; "
        "update transformers or name another model",
    )


def check_decoder(config: PretrainedConfig, source: str, trust_remote_code: bool) -> None:
    """Refuse whatever is not a decoder-only causal language model with plain weights."""
    if config.is_encoder_decoder:
        raise InputError(SOURCE, f"{source} is an encoder-decoder model ({config.model_type}); name a decoder-only one")
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        values = quantised if isinstance(quantised, dict) else quantised.to_dict()
        method = values.get("quant_method", "an unnamed method")
        raise InputError(
            SOURCE, f"{source} has weights quantised by {method}, which can't be merged; name the model it was made of"
        )
    if trust_remote_code and REMOTE_CLASS in (getattr(config, "auto_map", None) or {}):
        return
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if causal is None:
        raise InputError(SOURCE, f"{source} is no causal language model ({config.model_type}); name one that is")
    saved = (config.architectures or [causal])[0]
    # a multimodal checkpoint holds a causal model too; letter case differs in old Llama configs
    if not saved.lower().endswith((causal.lower(), "forcausallm", "forconditionalgeneration")):
        raise InputError(SOURCE, f"{source} is a {saved}, no causal language model; name a {causal}")


def read_weights(target: Path | str, source: str, **arguments: Any) -> PreTrainedModel:
    """The causal language model at `target` in eval mode; weights that are missing or of another shape are refused.

    Transformers would fill those with random numbers and only warn.
    """
    with reading("weights", source):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            target, ignore_mismatched_sizes=True, output_loading_info=True, **arguments
        )
    model, report = loaded
    lacking = sorted(report["missing_keys"]) + sorted(key for key, *_ in report["mismatched_keys"])
    if lacking:
        raise InputError(
            SOURCE,
            f"the weights of {source} don't fit its config.json: {len(lacking)} are missing or of another shape, "
            f"such as {lacking[0]}; copy or download the model again",
        )
    return cast(PreTrainedModel, model.eval())
