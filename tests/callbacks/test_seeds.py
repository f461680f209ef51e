"""Seeding a step gives what torch.manual_seed gives, and keeps nothing."""

import torch

from laco_train.callbacks.seeds import seed_device


def test_seeding_is_that_of_torch() -> None:
    for seed in (0, 7, -(2**62), 2**62):
        torch.manual_seed(seed)
        expected = torch.rand(3)
        seed_device(seed, torch.device("cpu"))
        assert torch.equal(torch.rand(3), expected)


def test_nothing_is_kept_for_devices_that_are_not_in_use() -> None:
    before = len(torch.xpu._queued_calls)
    seed_device(0, torch.device("cpu"))
    assert len(torch.xpu._queued_calls) == before
