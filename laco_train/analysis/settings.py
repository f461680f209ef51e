"""What a sweep tries, as data; imports no torch."""

from dataclasses import dataclass

from laco_train.checks import check_static


@dataclass(frozen=True)
class SweepSettings:
    """Layer Collapse at every combination of the values listed; layers count from 1 here, as in the paper."""

    enabled: bool = False
    """Run the sweep; `--sweep true` is short for this, and any list below implies it."""
    layers_per_merge: list[int] | None = None
    """C: values to try; each 2 to the depth; null: 2, 3 and 4."""
    lowest_layer: list[int] | None = None
    """L: values to try; each 1 to H - C; null: that of collapse."""
    highest_layer: list[int] | None = None
    """H: values to try; each L + C to the depth; null: that of collapse."""
    similarity_thresholds: list[float] | None = None
    """T: values to try; each -1 to 1; null: 0.95, 0.9, 0.85, 0.8, 0.7, 0.6 and 0.5."""
    min_interval: list[int] | None = None
    """I: values to try; each 1 or more; null: that of collapse."""
    max_loss_increase: float = 1.0
    """Nats per calibration token that the recommended setting may cost before any training; 0 or more."""

    @property
    def requested(self) -> bool:
        """Whether a sweep was asked for."""
        lists = (
            self.layers_per_merge,
            self.lowest_layer,
            self.highest_layer,
            self.similarity_thresholds,
            self.min_interval,
        )
        return self.enabled or any(values is not None for values in lists)


def check_sweep(s: SweepSettings, depth: int | None = None) -> None:
    """Refuse values that no model, or none of `depth` layers, could use; an InputError names the key."""
    _check(s.layers_per_merge, "layers_per_merge", 2, depth)
    _check(s.lowest_layer, "lowest_layer", 1, depth)
    _check(s.highest_layer, "highest_layer", 3, depth)
    _check(s.similarity_thresholds, "similarity_thresholds", -1, 1)
    _check(s.min_interval, "min_interval", 1, None)
    allowed = s.max_loss_increase
    check_static("sweep.max_loss_increase", allowed >= 0, f"must be 0 or more, is {allowed}")


def _check(values: list[int] | list[float] | None, name: str, least: int, most: int | None) -> None:
    if values is None:
        return
    key = f"sweep.{name}"
    check_static(key, len(values) > 0, "is empty; list values, or drop it")
    check_static(key, min(values) >= least, f"has {min(values)}, the least is {least}")
    check_static(key, most is None or max(values) <= most, f"has {max(values)}, the most is {most}")
