"""GGUF weights as a plain float32 folder, converted once and cached by the file's hash."""

import hashlib
import os
import shutil
from functools import lru_cache
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError
from transformers import AutoTokenizer, GgufConfig

from laco_train.errors import InputError
from laco_train.files import home
from laco_train.models.checks import SOURCE, read_weights, reading


def cache_root() -> Path:
    """Where laco_train keeps what it can make again: $LACO_TRAIN_CACHE, or laco_train in the user's cache folder."""
    own = os.environ.get("LACO_TRAIN_CACHE")
    if own:
        return home(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "laco_train"


def converted(file: Path, source: str) -> Path:
    """Folder of the model in `file`: float32 safetensors, tokenizer, generation config; made on first use.

    It appears under its name only when complete. Processes that want the same file wait for the first of them.

    Raises:
        InputError: the file can't be read as a causal language model, or the cache can't be written.
    """
    status = file.stat()
    models = cache_root() / "models"
    folder = models / f"{_sha256(file, status.st_size, status.st_mtime_ns)[:16]}-{file.stem}"
    if folder.is_dir():
        return folder
    try:
        models.mkdir(parents=True, exist_ok=True)
        with FileLock(models / f"{folder.name}.lock"):
            if not folder.is_dir():
                print(f"Converting {file.name} to float32 safetensors, once; cached in {folder}", flush=True)
                _convert(file, source, folder)
    except (OSError, SafetensorError) as error:
        raise InputError(
            SOURCE, f"can't write its weights to {models} ({error}); set LACO_TRAIN_CACHE to a folder with room"
        ) from error
    return folder


def _convert(file: Path, source: str, folder: Path) -> None:
    """Write `folder` beside its place, then rename it; the caller holds the lock."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
    model = read_weights(
        file.parent, source, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    with reading("tokenizer", source):
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for token in ("eos_token", "pad_token"):  # Transformers 5.17 takes BOS for EOS and drops PAD; its config is right
        index = getattr(model.config, f"{token}_id")
        if index is not None:
            setattr(tokenizer, token, tokenizer.convert_ids_to_tokens(index))
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@lru_cache
def _sha256(file: Path, size: int, modified_ns: int) -> str:
    """Hash of the bytes of `file`; size and time are there to notice that it has changed."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
