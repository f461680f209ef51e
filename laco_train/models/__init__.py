"""A causal language model and its tokenizer from a hub id, a folder, a .gguf file or a file that a package ships."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from laco_train.models.checks import (
    check_class_is_known,
    check_decoder,
    check_sizes,
    check_tokenizer_files,
    check_weight_files,
    read_weights,
    reading,
)
from laco_train.models.sources import require_safetensors, resolve_folder

__all__ = ["load_config", "load_model", "load_tokenizer", "resolve_folder"]


def load_config(source: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Config of the causal language model at `source`; no weights are read (a GGUF file is converted first).

    Raises:
        InputError: `source` is no decoder-only causal language model, is quantised, or needs code that isn't trusted.
    """
    return _config(resolve_folder(source), source, trust_remote_code)


def load_model(source: str, *, dtype: torch.dtype, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model at `source` on the CPU, in eval mode, its weights cast to `dtype` as they are read.

    Only safetensors are read: a pickle may run code. Attention is Transformers' own choice (sdpa where there is one).

    Raises:
        InputError: as `load_config`; also weights that are missing, incomplete, pickled or damaged.
    """
    target = resolve_folder(source)
    config = _config(target, source, trust_remote_code)
    if isinstance(target, Path):
        check_weight_files(target, source)
    else:
        require_safetensors(target)
    return read_weights(
        target, source, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code
    )


def load_tokenizer(source: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer at `source`.

    Raises:
        InputError: as `resolve_folder`; also no tokenizer there, or one that can't be read.
    """
    target = resolve_folder(source)
    if isinstance(target, Path) and not trust_remote_code:
        check_tokenizer_files(target, source)
    with reading("tokenizer", source):
        return AutoTokenizer.from_pretrained(target, trust_remote_code=trust_remote_code)


def _config(target: Path | str, source: str, trust_remote_code: bool) -> PretrainedConfig:
    """Config at `target`, refused unless it is that of a decoder-only causal language model."""
    with reading("config.json", source):
        values, _ = PretrainedConfig.get_config_dict(target)
        if not isinstance(values, dict):
            raise ValueError("it is no JSON object")
        check_class_is_known(values, source, trust_remote_code)
    with reading("config.json", source):
        config = AutoConfig.from_pretrained(target, trust_remote_code=trust_remote_code)
    with reading("config.json", source):
        check_decoder(config, source, trust_remote_code)
        check_sizes(config, source)
    return config
