"""What any of several processes says, told to all without the host waiting for the device (issue 9, DDP's speed)."""

import torch
from torch import Tensor


class Agreement:
    """The largest number that a rank has said, known one call later.

    To know at once, the host would wait until the device has done all that is queued, and the device would then wait
    for the host to queue the next step. One process knows at once. What was said at the last call is never told here.

    Args:
        device: of this rank, where its process group sums.
        ranks: processes that call it, all equally often.
    """

    def __init__(self, device: torch.device, ranks: int):
        self._device, self._ranks = device, ranks
        self._asked: tuple[Tensor, torch.cuda.Event | None] | None = None

    def __call__(self, said: int) -> int:
        """What the ranks said at the call before this one, 0 at the first; of one rank, `said`."""
        if self._ranks == 1:
            return said
        answer = self._answer()
        self._ask(said)
        return answer

    def _answer(self) -> int:
        if self._asked is None:
            return 0
        told, copied = self._asked
        if copied is not None:
            copied.synchronize()
        return int(told)

    def _ask(self, said: int) -> None:
        largest = torch.full((), said, device=self._device)  # torch.tensor would wait for the copy
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
        if largest.device.type != "cuda":
            self._asked = largest.cpu(), None
            return
        told, copied = torch.empty_like(largest, device="cpu", pin_memory=True), torch.cuda.Event()
        told.copy_(largest, non_blocking=True)
        copied.record()
        self._asked = told, copied
