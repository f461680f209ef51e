"""What several tests of training begin with."""

import pytest
import torch

from laco_train.training.loss import Batch


@pytest.fixture
def batch() -> Batch:
    """Two blocks of 16: two documents in one, labels of a chat in the other."""
    ids = torch.randint(4, 300, (2, 16), generator=torch.Generator().manual_seed(5))
    labels = ids.clone()
    labels[0, 9] = labels[1, :6] = labels[1, 12:] = -100
    positions = torch.stack([torch.cat([torch.arange(9), torch.arange(7)]), torch.arange(16)])
    return {"input_ids": ids, "labels": labels, "position_ids": positions}
