"""Seeding a step gives what torch.manual_seed gives, without its work for devices that are not in use."""

import pytest
import torch

from laco_train.callbacks.seeds import seed_device

CPU = torch.device("cpu")


def test_seeding_is_that_of_torch() -> None:
    for seed in (0, 7, -(2**62), 2**62):
        torch.manual_seed(seed)
        expected = torch.rand(3)
        seed_device(seed, CPU)
        assert torch.equal(torch.rand(3), expected)


def test_devices_that_are_not_in_use_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def seeded(seed: int) -> None:
        raise AssertionError("an XPU is not in use")

    monkeypatch.setattr(torch.xpu, "manual_seed_all", seeded)
    seed_device(0, CPU)
    with pytest.raises(AssertionError, match="not in use"):  # what it is there to avoid
        torch.manual_seed(0)
