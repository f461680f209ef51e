"""What runs need on the disk, told and checked before they start."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from laco_train.collapse import Decoder, count_parameters, decoder_of
from laco_train.collapse.apply import target_depth
from laco_train.collapse.decoder import keep_layers
from laco_train.errors import InputError
from laco_train.precision import named_dtype, weights_dtype
from laco_train.settings import CollapseSettings, ExportSettings, ModelSettings
from laco_train.training.adapters import attach_lora
from laco_train.training.checkpointing import optimizer_bytes
from laco_train.training.last_layers import train_last_layers
from laco_train.training.parallel import skeleton

_KEY = "trainer.default_root_dir"


@dataclass(frozen=True)
class RunSize:
    """What a run writes, in bytes.

    Attributes:
        checkpoint: one of them; 0: none is written.
        stays: its checkpoints, its adapter and the weights that were fitted before training, at its end.
        export: the exported model.
    """

    checkpoint: int
    stays: int
    export: int


def run_size(
    model: ModelSettings, collapse: CollapseSettings, export: ExportSettings, precision: str, *, kept: int
) -> RunSize:
    """What a run writes at most; no weights are read.

    Args:
        precision: Lightning's name.
        kept: checkpoints that stay.

    Raises:
        InputError: model.method or collapse.target_ratio asks for what this model has not.
    """
    dtype = weights_dtype(model.dtype, precision)
    lm = skeleton(model.source, dtype=dtype, trust_remote_code=model.trust_remote_code)
    decoder = decoder_of(lm)
    keep_layers(decoder, _left(decoder, collapse))
    whole = count_parameters(lm) * dtype.itemsize
    whole_layer = max(sum(p.numel() for p in layer.parameters()) for layer in decoder.stack) * dtype.itemsize
    exported = count_parameters(lm) * (dtype if export.dtype == "auto" else named_dtype(export.dtype)).itemsize
    trained: nn.Module = lm
    if model.method == "lora":
        trained = attach_lora(lm, model.lora)
    elif model.method == "last_layers":
        train_last_layers(lm, model.last_layers)
    weights = sum(p.numel() * p.element_size() for p in trained.parameters() if p.requires_grad)
    o = model.optimizer
    states = optimizer_bytes(trained, eight_bit=o.eight_bit, exact=o.small_updates == "float32")
    adapter = weights if model.method == "lora" and export.enabled else 0
    fitted = whole if collapse.refine.tokens else whole_layer if collapse.strategy == "streamline" else 0
    return RunSize(
        checkpoint=weights + states if kept else 0,
        stays=kept * (weights + states) + adapter + fitted,
        export=exported if export.enabled else 0,
    )


def _left(decoder: Decoder, collapse: CollapseSettings) -> list[int]:
    """Layers that may be left; as many of the largest as a target leaves, as no search has said which."""
    layers = range(decoder.depth)
    if collapse.remove is not None:
        return [layer for layer in layers if layer not in collapse.remove]
    largest = sorted(layers, key=lambda layer: sum(p.numel() for p in decoder.stack[layer].parameters()), reverse=True)
    return sorted(largest[: target_depth(decoder, collapse)])


def needed(runs: Sequence[tuple[RunSize, Path]], *, exports_stay: bool = True) -> int:
    """Bytes that `runs`, one after another, need beside what is there: all that stays, and a checkpoint in writing.

    Args:
        runs: sizes and folders, which need not exist.
        exports_stay: else each goes once the next is there.
    """
    sizes = [size for size, _ in runs]
    exports = [size.export for size in sizes]
    if not exports_stay:
        exports = [max((one + next_one for one, next_one in zip([0, *exports], exports, strict=False)), default=0)]
    there = sum(min(size.stays + size.export, _bytes(folder)) for size, folder in runs)
    stay = sum(size.stays for size in sizes) + sum(exports)
    return max(0, stay - there) + max((size.checkpoint for size in sizes), default=0)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def check_room(wanted: int, folder: Path) -> str:
    """What is needed and what there is, in a line.

    Args:
        wanted: bytes.
        folder: where it goes; it need not exist.

    Raises:
        InputError: there is less, or `folder` is no folder.
    """
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        raise InputError(_KEY, f"{place} is no folder; name another place")
    free = shutil.disk_usage(place).free
    said = f"{wanted / 2**30:,.2f} GiB of disk are needed, {free / 2**30:,.2f} are free at {place}"
    if wanted > free:
        raise InputError(_KEY, f"{said}; make room, or name another place")
    return said
