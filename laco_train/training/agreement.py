"""What any of several processes says, told to all without the host waiting for the device (issue 9, DDP's speed)."""

import torch
from torch import Tensor


class Agreement:
    """Whether any rank has said yes, known one call later.

    To know at once, the host would wait until the device has done all that is queued, and the device would then wait
    for the host to queue the next step. One process knows at once.

    Args:
        device: of this rank, where its process group sums.
        ranks: processes that call it, all equally often.
    """

    def __init__(self, device: torch.device, ranks: int):
        self._device, self._ranks = device, ranks
        self._asked: tuple[Tensor, torch.cuda.Event | None] | None = None

    def __call__(self, yes: bool) -> bool:
        """What the ranks said at the call before this one, False at the first; of one rank, `yes`."""
        if self._ranks == 1:
            return yes
        answer = self._answer()
        self._ask(yes)
        return answer

    def _answer(self) -> bool:
        if self._asked is None:
            return False
        told, copied = self._asked
        if copied is not None:
            copied.synchronize()
        return bool(told)

    def _ask(self, yes: bool) -> None:
        said = torch.full((), int(yes), device=self._device)  # torch.tensor would wait for the copy
        torch.distributed.all_reduce(said, torch.distributed.ReduceOp.MAX)
        if said.device.type != "cuda":
            self._asked = said.cpu(), None
            return
        told, copied = torch.empty_like(said, device="cpu", pin_memory=True), torch.cuda.Event()
        told.copy_(said, non_blocking=True)
        copied.record()
        self._asked = told, copied
