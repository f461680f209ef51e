"""What several processes tell each other; real ones: tests/distributed/test_data_parallel.py."""

import pytest
import torch
from torch import Tensor

from laco_train.training.agreement import Agreement

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def test_one_process_knows_at_once() -> None:
    any_rank = Agreement(torch.device("cpu"), 1)
    assert [any_rank(said) for said in (0, 15, 0)] == [0, 15, 0]


@pytest.mark.parametrize("device", DEVICES)
def test_several_know_one_call_later(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    others = iter([0, 10, 0, 0])

    def all_reduce(value: Tensor, operation: object) -> None:
        assert operation == torch.distributed.ReduceOp.MAX
        value.clamp_(min=next(others))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    any_rank = Agreement(torch.device(device), 2)
    assert [any_rank(said) for said in (0, 0, 15, 0)] == [0, 0, 10, 15]
