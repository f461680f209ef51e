"""How long training itself takes."""

import time
from typing import Any

import torch


def wait_for(device: torch.device) -> None:
    """Until `device` has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class TrainingClock:
    """Adds up time and tokens of training, but for the first batch of a process, in which layers are compiled.

    Attributes:
        seconds: time so far.
        tokens: tokens trained on in that time.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.tokens = 0
        self._warm = False
        self._since: tuple[float, int] | None = None

    def reset(self) -> None:
        """A process begins to train: its first batch does not count."""
        self._warm, self._since = False, None

    def warmed(self, device: torch.device) -> None:
        """A batch is done: the next one counts."""
        if not self._warm:
            wait_for(device)
            self._warm = True

    @property
    def running(self) -> bool:
        """Whether time is being added up."""
        return self._since is not None

    def start(self, tokens: int) -> None:
        """Run, unless it does already; `tokens` were trained on so far."""
        if self._warm and not self.running:
            self._since = (time.perf_counter(), tokens)

    def stop(self, tokens: int, device: torch.device) -> None:
        """Add up, once `device` is done."""
        if self._since is not None:
            wait_for(device)
            began, before = self._since
            self.seconds += time.perf_counter() - began
            self.tokens += tokens - before
            self._since = None

    def state_dict(self) -> dict[str, Any]:
        """The sums, as of the last stop."""
        return {"seconds": self.seconds, "tokens": self.tokens}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See state_dict."""
        self.seconds, self.tokens = state_dict["seconds"], state_dict["tokens"]
