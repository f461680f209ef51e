"""Refuses, in one line each, what can't be collapsed: other kinds of model, and weights that aren't all there."""

import json
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
INDEX = "model.safetensors.index.json"
REMOTE_CLASS = "AutoModelForCausalLM"
# what Transformers, safetensors and gguf raise over files that are damaged or made for another version
UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    ImportError,
    RecursionError,
    StrictDataclassError,
    SafetensorError,
    struct.error,
)
MOST_LAYERS, MOST_WIDTH = 10_000, 2**31 - 1
_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
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
    except InputError:
        raise
    except UNREADABLE as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise InputError(
            SOURCE, f"can't read the {part} of {source} ({reason}); copy or download it again, or update transformers"
        ) from error


def check_model_folder(folder: Path, source: str) -> None:
    """Refuse a folder without a config.json."""
    adapter, config = ((folder / name).is_file() for name in ("adapter_config.json", "config.json"))
    if adapter:  # which Transformers would put on the model without a word
        kind = "beside its model" if config else "not a model"
        raise InputError(SOURCE, f"{source} holds a peft adapter, {kind}; merge it into its base model first")
    if config:
        return
    raise InputError(SOURCE, f"{source} is no model folder: it has no config.json; name the folder that has one")


def check_weight_files(folder: Path, source: str) -> None:
    """Refuse a folder without safetensors weights."""
    if (folder / INDEX).is_file():
        check_index(folder / INDEX, source)
        return
    if (folder / "model.safetensors").is_file():
        return
    if any(folder.glob("pytorch_model*.bin")):
        raise InputError(SOURCE, pickled_only(source))
    raise InputError(SOURCE, f"{source} has a config.json but no weights (model.safetensors); copy them there")


def check_index(file: Path, source: str) -> None:
    """Refuse an index of weights that is none, or that names pickles, which Transformers would unpickle."""
    try:
        names = set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values())
        foreign = sorted(name for name in names if not name.endswith(".safetensors"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = f"{file.name} of {source} is damaged ({type(error).__name__}: {error}); copy or download it again"
        raise InputError(SOURCE, problem) from None
    if foreign:
        problem = f"{file.name} of {source} names {foreign[0]}; only safetensors are read, as a pickle can run code"
        raise InputError(SOURCE, problem)


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
    attention = getattr(config, "_attn_implementation", None)
    if isinstance(attention, str) and "/" in attention and not trust_remote_code:
        problem = f"{source} asks for the attention kernel {attention}, which is code of the hub; set this to true if"
        raise InputError("model.trust_remote_code", f"{problem} you trust it, or drop that from config.json")
    if trust_remote_code and REMOTE_CLASS in (getattr(config, "auto_map", None) or {}):
        return
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if causal is None:
        raise InputError(SOURCE, f"{source} is no causal language model ({config.model_type}); name one that is")
    saved = (config.architectures or [causal])[0]
    # a multimodal checkpoint holds a causal model too; letter case differs in old Llama configs
    if not saved.lower().endswith((causal.lower(), "forcausallm", "forconditionalgeneration")):
        raise InputError(SOURCE, f"{source} is a {saved}, no causal language model; name a {causal}")


def check_sizes(config: PretrainedConfig, source: str) -> None:
    """Refuse sizes that no model has: a stack without layers would load, one of a million never end."""
    text = config.get_text_config()
    for name in _SIZES:
        value = getattr(text, name, None)
        most = MOST_LAYERS if name == "num_hidden_layers" else MOST_WIDTH
        if value is not None and not (isinstance(value, int) and 1 <= value <= most):
            problem = f"config.json of {source} has {name} {value!r}, which must be 1 to {most:,}"
            raise InputError(SOURCE, f"{problem}; copy or download it again")


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
