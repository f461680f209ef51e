"""Why a model can't be exported to ONNX, in one line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import LlamaForCausalLM

from laco_train.errors import TrainingStopped
from laco_train.export.onnx import PACKAGES, Onnx, reason_of


def test_the_first_cause_is_told_without_colours() -> None:
    """torch's own error tells the step alone, with the causes behind it."""
    step, node = RuntimeError("\x1b[96mThis is step 3/3\x1b[0m"), RuntimeError("node")
    node.__cause__ = ValueError("No function for \x1b[96mgrouped_mm\x1b[0m.\n  Told in two lines.\n\n## A list")
    step.__cause__ = node
    assert reason_of(step) == "ValueError: No function for grouped_mm. Told in two lines."


class Undecided(LlamaForCausalLM):
    """Computes one thing or another by the values of its input, which no graph does."""

    def forward(self, input_ids: Tensor, **arguments: Any) -> Any:
        """Logits of the tokens, or of others."""
        return super().forward(input_ids if input_ids.sum() > 3 else input_ids + 1, **arguments)


def test_a_model_that_is_no_graph(tmp_path: Path, tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    for package in PACKAGES:
        pytest.importorskip(package)
    with pytest.raises(TrainingStopped) as error:
        Onnx().write(tmp_path, Undecided(tiny_llama(layers=1).config).eval(), tmp_path)
    line = str(error.value)
    assert line.startswith("export: torch.onnx can't export this llama, nothing was exported: GuardOnDataDependent")
    assert line.endswith("; another --format may, or another version of torch and onnxscript")
    assert "\n" not in line and "\x1b" not in line
