"""What a run's models write after the same prompts: the original, the collapsed and the trained one."""

from collections.abc import Sequence
from typing import Any, Literal

from lightning.pytorch import Callback
from torch import nn
from transformers import PreTrainedTokenizerBase

from laco_train.evaluation.samples import continuations
from laco_train.training.layers import called_plainly
from laco_train.training.loss import base_of

Moment = Literal["original", "collapsed", "trained"]


class Samples(Callback):
    """Keeps continuations; whoever has a model whole in memory calls `write`, on rank 0 alone.

    Args:
        prompts: to go on after.

    Attributes:
        written: by moment, a continuation a prompt.
    """

    def __init__(self, prompts: Sequence[str]):
        self.prompts = tuple(prompts)
        self.written: dict[str, list[str]] = {}

    def write(self, moment: Moment, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        """Let `model`, a Transformers model or one wrapped by peft, write on; it is left in eval mode."""
        print(f"Samples of the {moment} model", flush=True)
        with called_plainly(model.eval()):
            self.written[moment] = continuations(base_of(model), tokenizer, self.prompts)

    def state_dict(self) -> dict[str, Any]:
        """All of it, so that a resumed run need not have the original in memory again."""
        return {"prompts": list(self.prompts), "written": dict(self.written)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See state_dict."""
        self.prompts, self.written = tuple(state_dict["prompts"]), state_dict["written"]
