"""The licence of a base model, as far as its own files tell, and what some licences ask of a model made from it."""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import yaml
from huggingface_hub import hf_hub_download, metadata_load
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled, RemoteEntryNotFoundError

from laco_train.errors import InputError
from laco_train.files import home
from laco_train.models.sources import PACKAGE_PREFIX, package_file

_GGUF_STRING, _GGUF_ARRAY = 8, 9
_GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_LONGEST = 2**20
_UNKNOWN = (OSError, HTTPError, OfflineModeIsEnabled, RemoteEntryNotFoundError, InputError, yaml.YAMLError)
_LLAMA = (
    'The Llama licence asks you to show "Built with {name}" where you use or share this model, to begin its name with '
    '"{start}", and to pass on a copy of the licence and its attribution notice.'
)
# by how the id or the name of the licence begins; the first that fits counts
_REMINDERS = {
    "llama2": "The Llama 2 licence asks you to pass on a copy of it, and its attribution notice in a file Notice.",
    "llama3.": _LLAMA.format(name="Llama", start="Llama"),
    "llama3": _LLAMA.format(name="Meta Llama 3", start="Llama 3"),
    "llama4": _LLAMA.format(name="Llama", start="Llama"),
    "gemma": "The Gemma terms ask you to pass them on with this model, their use restrictions included, and to say "
    "that the files were changed.",
    "qwen": 'The Qwen licence asks you to show "Built with Qwen" or "Improved using Qwen" where you share this model.',
    "tongyi-qianwen": 'The Qwen licence asks you to show "Built with Qwen" or "Improved using Qwen" where you share '
    "this model.",
}


@dataclass(frozen=True)
class Licence:
    """A licence as the Hub spells it.

    Attributes:
        id: such as ``apache-2.0``, or ``other``.
        name: of a licence that the Hub has no id for.
        link: to its text.
    """

    id: str
    name: str | None = None
    link: str | None = None

    @property
    def metadata(self) -> dict[str, str]:
        """As a model card has it."""
        named = {"license": self.id, "license_name": self.name, "license_link": self.link}
        return {key: value for key, value in named.items() if value is not None}

    @property
    def reminder(self) -> str | None:
        """What it asks of whoever shares a model made from its model, in a sentence; None if nothing is known."""
        called = (self.name or self.id).lower()
        return next((text for start, text in _REMINDERS.items() if called.startswith(start)), None)


def licence_of(source: str) -> Licence | None:
    """Licence of what ``model.source`` names: from its model card, or from its GGUF file; None if neither tells."""
    try:
        path = package_file(source) if source.startswith(PACKAGE_PREFIX) else home(source)
        if path.is_file():
            return _read_gguf(path)
        card = path / "README.md" if path.is_dir() else Path(hf_hub_download(source, "README.md"))
        return _licence(metadata_load(card) or {}) if card.is_file() else None
    except (*_UNKNOWN, ValueError, KeyError, struct.error):  # a card that can't be had or read tells nothing
        return None


def _licence(values: Mapping[str, Any]) -> Licence | None:
    if not isinstance(values.get("license"), str):
        return None
    name, link = (values.get(key) for key in ("license_name", "license_link"))
    return Licence(values["license"], name if isinstance(name, str) else None, link if isinstance(link, str) else None)


def _read_gguf(path: Path) -> Licence | None:
    """From the first keys of the header; gguf's own reader would go through all tokens too, which takes seconds."""
    found: dict[str, str] = {}
    with path.open("rb") as file:
        magic, _, _, keys = struct.unpack("<4sIQQ", file.read(24))
        for _ in range(keys if magic == b"GGUF" else 0):
            key = _string(file)
            (kind,) = struct.unpack("<I", file.read(4))
            if kind == _GGUF_ARRAY and not key.startswith("general."):
                break  # the general keys come first
            value = _skip_value(file, kind)
            if value is not None and key.startswith("general.license"):
                found[key.removeprefix("general.").replace(".", "_")] = value
    return _licence(found)


def _skip_value(file: BinaryIO, kind: int) -> str | None:
    """Go past a value; it, if it is a string."""
    if kind == _GGUF_STRING:
        return _string(file)
    if kind == _GGUF_ARRAY:
        inner, length = struct.unpack("<IQ", file.read(12))
        for _ in range(length):
            _skip_value(file, inner)
    else:
        file.seek(_GGUF_SIZES[kind], 1)
    return None


def _string(file: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", file.read(8))
    if length > _LONGEST:
        raise ValueError(f"a string of {length} bytes in a header")
    return file.read(length).decode("utf-8", errors="replace")
