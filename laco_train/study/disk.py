"""What a study needs on the disk, told and checked before it starts."""

import shutil
from pathlib import Path

from laco_train.collapse.decoder import decoder_of
from laco_train.errors import InputError
from laco_train.precision import named_dtype, weights_dtype
from laco_train.settings import CollapseSettings, ExportSettings, ModelSettings
from laco_train.training.checkpointing import optimizer_bytes
from laco_train.training.parallel import skeleton

_KEPT = 2  # checkpoints of a run: the best and the newest


def run_bytes(
    model: ModelSettings, collapse: CollapseSettings, export: ExportSettings, precision: str
) -> tuple[int, int]:
    """(bytes of one checkpoint, bytes of the export) of a run that trains every weight; no weights are read.

    A run of another method keeps less.
    """
    dtype = weights_dtype(model.dtype, precision)
    empty = skeleton(model.source, dtype=dtype, trust_remote_code=model.trust_remote_code)
    decoder = decoder_of(empty)
    parameters = sum(p.numel() for p in empty.parameters())
    layers = sum(p.numel() for p in decoder.stack.parameters())
    left = parameters
    if collapse.target_depth is not None:
        left -= layers * (decoder.depth - collapse.target_depth) // decoder.depth
    elif collapse.target_ratio is not None:
        left -= int(collapse.target_ratio * parameters)
    o = model.optimizer
    states = optimizer_bytes(empty, eight_bit=o.eight_bit, exact=o.small_updates == "float32")
    checkpoint = left * dtype.itemsize + states * left // parameters
    exported = dtype if export.dtype == "auto" else named_dtype(export.dtype)
    return checkpoint, left * exported.itemsize if export.enabled else 0


def needed(runs: list[tuple[int, int]]) -> int:
    """Bytes that `runs`, one after another, need: all that each keeps, and a checkpoint that is being written."""
    return sum(_KEPT * checkpoint + export for checkpoint, export in runs) + max((one for one, _ in runs), default=0)


def check_room(wanted: int, folder: Path) -> str:
    """What is needed and what there is, in a line.

    Args:
        folder: where it goes; it need not exist.

    Raises:
        InputError: there is less.
    """
    place = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    said = f"{wanted / 2**30:,.2f} GiB of disk are needed, {free / 2**30:,.2f} are free at {place}"
    if wanted > free:
        raise InputError("trainer.default_root_dir", f"{said}; make room, or name another place")
    return said
