"""ONNX: the forward pass as one graph, float32 weights beside it; no KV cache."""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from laco_train.errors import TrainingStopped
from laco_train.export.card import Packaging
from laco_train.export.runtime_proof import Ids, greedy_by_checking, prove_equal

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
FILE = "model.onnx"
_LONGEST_REASON = 300
INPUTS = ("input_ids", "attention_mask", "position_ids")


class Onnx:
    """Writes the graph and proves it."""

    packaging = Packaging(
        "onnx",
        ("onnx",),
        """ONNX Runtime (`pip install onnxruntime transformers`). The graph has no KV cache: it gives the logits of
whole sequences, in batches padded on any side.

```python
import numpy as np
import onnxruntime
from transformers import AutoTokenizer

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder)
session = onnxruntime.InferenceSession(f"{folder}/model.onnx")
ids = np.array([tokenizer("The river rises in").input_ids])
inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.shape[1])[None]}
print(tokenizer.decode(session.run(["logits"], inputs)[0][0, -1].argmax()))
```
""",
        "",
    )
    rounded_to = torch.float32

    def write(self, source: Path, model: PreTrainedModel, folder: Path) -> None:
        """Export the graph of `model` into `folder`.

        Raises:
            TrainingStopped: torch can't trace or translate this model.
        """
        ids = torch.ones(2, 8, dtype=torch.long)
        mask = ids.clone()
        mask[0, :3] = 0
        shapes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's, about its own use of torch
                torch.onnx.export(
                    _Logits(model),
                    (ids, mask, _positions(mask)),
                    str(folder / FILE),
                    dynamo=True,
                    verbose=False,
                    external_data=True,
                    input_names=list(INPUTS),
                    output_names=["logits"],
                    dynamic_shapes=(shapes,) * len(INPUTS),
                )
        except torch.onnx.errors.OnnxExporterError as error:
            kind = model.config.model_type
            raise TrainingStopped(
                f"export: torch.onnx can't export this {kind}, nothing was exported: {reason_of(error)}; "
                "another --format may, or another version of torch and onnxscript"
            ) from error

    def prove(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[str]:
        """Lines of the proof; TrainingStopped if there is none."""
        return prove_equal(model, Session(folder, model), tokenizer).lines()


def reason_of(error: BaseException) -> str:
    """What first went wrong, in a line: torch's own error tells which step failed, in colours, and its causes why."""
    while error.__cause__ is not None:
        error = error.__cause__
    words = re.sub(r"\x1b\[[\d;]*m", "", str(error)).split("\n\n")[0].split()
    return f"{type(error).__name__}: {' '.join(words)[:_LONGEST_REASON]}"


class Session:
    """onnxruntime on the graph that was written; sequences go as one batch, padded on the left.

    Args:
        folder: what was written.
        draft: proposes greedy tokens, as each pass of the graph is over a whole text.
    """

    name = "onnxruntime"

    def __init__(self, folder: Path, draft: PreTrainedModel):
        import onnxruntime

        self._draft = draft
        self._session = onnxruntime.InferenceSession(str(folder / FILE), providers=["CPUExecutionProvider"])

    def greedy(self, prompts: Sequence[Ids], count: int) -> list[Ids]:
        """See `Runtime`."""
        return greedy_by_checking(self._draft, self.logits, prompts, count)

    def logits(self, sequences: Sequence[Ids]) -> list[Tensor]:
        """See `Runtime`."""
        longest = max(map(len, sequences))
        ids = torch.tensor([[0] * (longest - len(one)) + one for one in sequences])
        mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in sequences])
        feed = {name: t.numpy() for name, t in zip(INPUTS, (ids, mask, _positions(mask)), strict=True)}
        logits = torch.from_numpy(self._session.run(["logits"], feed)[0])
        return [row[longest - len(one) :] for row, one in zip(logits, sequences, strict=True)]


class _Logits(nn.Module):
    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        ).logits
        return logits


def _positions(mask: Tensor) -> Tensor:
    """Place of each token among those that are not padding; (batch, T)."""
    return (mask.cumsum(dim=-1) - 1).clamp(min=0)
