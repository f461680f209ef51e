"""Where the weights lie during a search: on the device, or in host memory with a few layers brought in at a time.

Issue 4: a model larger than the GPU is searched with about C + 2 of its layers on it.
"""

import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from laco_train.collapse.decoder import Decoder
from laco_train.errors import InputError

# Left free for activations and for what the driver and other libraries take.
_HEADROOM = 1 << 29


class HasWeights(Protocol):
    """A layer of the standing model."""

    @property
    def history(self) -> object:
        """What went into it, which tells it from others."""

    @property
    def merged(self) -> Mapping[str, Tensor]:
        """Weights that a merge replaced."""

    def weights(self) -> dict[str, Tensor]:
        """Its parameters by name, wherever they lie."""


class OnDevice:
    """All weights are on the device: nothing is moved."""

    bytes_moved = 0

    def weights(self, slot: HasWeights) -> dict[str, Tensor]:
        """The weights of `slot`."""
        return slot.weights()

    def overrides(self, slot: HasWeights) -> Mapping[str, Tensor]:
        """What takes the place of its module's own weights when `slot` runs."""
        return slot.merged

    def expect(self, slot: HasWeights) -> None:
        """Nothing to fetch ahead."""

    def put_away(self, merged: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Merged weights that will be kept stay where they are."""
        return merged


class Streamed:
    """Weights stay in host memory; the last few layers that were used are on the device.

    The next layer is copied on a stream of its own while the device works on this one; host memory is page-locked where
    it lies, so that nothing is copied twice.

    Args:
        device: where layers are needed.
        layers: how many may be there at once: C for a window, one that runs and one on its way.

    Attributes:
        bytes_moved: bytes copied to the device so far.
    """

    def __init__(self, device: torch.device, layers: int):
        self.device = device
        self.layers = layers
        self.bytes_moved = 0
        self._here: OrderedDict[object, dict[str, Tensor]] = OrderedDict()
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ready: dict[object, torch.cuda.Event] = {}

    def weights(self, slot: HasWeights) -> dict[str, Tensor]:
        """The weights of `slot` on the device, copied if they are not there yet."""
        self._fetch(slot)
        event = self._ready.pop(slot.history, None)
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)
        self._here.move_to_end(slot.history)
        return self._here[slot.history]

    overrides = weights

    def expect(self, slot: HasWeights) -> None:
        """Begin to copy `slot`, which will be needed next."""
        self._fetch(slot)

    def put_away(self, merged: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Merged weights that will be kept, in host memory."""
        if self.device.type != "cuda":
            return merged
        kept = {name: torch.empty_like(value, device="cpu", pin_memory=True) for name, value in merged.items()}
        for name, value in merged.items():
            kept[name].copy_(value, non_blocking=True)
        torch.cuda.current_stream(self.device).synchronize()
        return kept

    def _fetch(self, slot: HasWeights) -> None:
        if slot.history in self._here:
            return
        while len(self._here) >= self.layers:
            self._here.popitem(last=False)
        weights = slot.weights()
        self.bytes_moved += sum(value.numel() * value.element_size() for value in weights.values())
        if self._copies is None:
            self._here[slot.history] = {name: value.detach().clone() for name, value in weights.items()}
            return
        # memory that is reused for this copy may still be read by work that was queued before
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        copied = {name: torch.empty_like(value, device=self.device) for name, value in weights.items()}
        with torch.cuda.stream(self._copies):
            for name, value in weights.items():
                copied[name].copy_(value.detach(), non_blocking=True)
        self._ready[slot.history] = self._copies.record_event()
        self._here[slot.history] = copied


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's parts."""

    layer: int
    rest: int
    depth: int

    @property
    def whole(self) -> int:
        """Bytes of all weights."""
        return self.depth * self.layer + self.rest


def sizes_of(decoder: Decoder) -> Sizes:
    """How many bytes the largest layer, the rest and all layers of the model take."""
    layers = [sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in decoder.stack]
    everything = sum(p.numel() * p.element_size() for p in decoder.model.parameters())
    return Sizes(max(layers), everything - sum(layers), decoder.depth)


def resolve(
    placement: Literal["auto", "device", "stream"], sizes: Sizes, device: torch.device, layers_per_merge: int, free: int
) -> Literal["device", "stream"]:
    """What `placement` means for a model of these sizes and `free` bytes on the device.

    Raises:
        InputError: it can't fit.
    """
    if device.type == "cpu":
        return "device" if placement == "auto" else placement
    streamed = (layers_per_merge + 3) * sizes.layer + sizes.rest
    fits, can_stream = sizes.whole + _HEADROOM <= free, streamed + _HEADROOM <= free
    if placement == "auto":
        placement = "device" if fits else "stream"
    needed, possible = (sizes.whole, fits) if placement == "device" else (streamed, can_stream)
    if not possible:
        way_out = "set it to stream" if placement == "device" and can_stream else "lower collapse.layers_per_merge"
        raise InputError(
            "collapse.placement",
            f"{placement} needs {(needed + _HEADROOM) / 2**30:.1f} GiB, {free / 2**30:.1f} are free; {way_out}",
        )
    return placement


def free_bytes(device: torch.device) -> int:
    """Bytes that this process may still take on `device`, a limit set by torch included; 0 for a CPU."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    limit = int(torch.cuda.get_per_process_memory_fraction(device.index) * total)  # "cuda" alone has no index
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(free + idle, limit - torch.cuda.memory_allocated(device))


@contextmanager
def rest_on(decoder: Decoder, device: torch.device) -> Iterator[None]:
    """All but the layers on `device` for the time of the block, and layers page-locked where they lie."""
    inside = {id(p) for p in decoder.stack.parameters()}
    outside = [p for p in decoder.model.parameters() if id(p) not in inside]
    buffers = [b for b in decoder.model.buffers()]
    home = [p.device for p in (*outside, *buffers)]
    for tensor in (*outside, *buffers):
        tensor.data = tensor.data.to(device)
    locked = _page_lock(decoder) if device.type == "cuda" else []
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        for pointer in locked:
            torch.cuda.cudart().cudaHostUnregister(pointer)
        for tensor, where in zip((*outside, *buffers), home, strict=True):
            tensor.data = tensor.data.to(where)


def _page_lock(decoder: Decoder) -> list[int]:
    """Page-lock the layers' storages where they lie, so that copies run at full speed; returns their addresses."""
    locked: list[int] = []
    for parameter in decoder.stack.parameters():
        storage = parameter.untyped_storage()
        if parameter.is_cuda or parameter.is_pinned() or storage.data_ptr() in locked:
            continue
        if int(torch.cuda.cudart().cudaHostRegister(storage.data_ptr(), storage.nbytes(), 0)) != 0:
            warnings.warn("host memory could not be page-locked, so streaming will be slower", stacklevel=2)
            return locked
        locked.append(storage.data_ptr())
    return locked
