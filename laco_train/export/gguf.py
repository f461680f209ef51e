"""GGUF for llama.cpp: written by llama.cpp's own converter, proven in llama-cpp-python where that is installed."""

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from laco_train.errors import InputError, TrainingStopped
from laco_train.export.card import Packaging
from laco_train.export.runtime_proof import PROMPTS, Ids, failed, greedy, prove_equal, prove_near, text_logits
from laco_train.files import home
from laco_train.models.checks import UNREADABLE

GgufType = Literal["f16", "q8_0"]
PACKAGES = ("sentencepiece",)  # of the converter, whatever the tokenizer
CONVERTER = "convert_hf_to_gguf.py"
_FLOAT32 = 0  # of ggml's types
_USE = """llama.cpp, and what builds on it:

```bash
llama-cli -m {file} -p "The river rises in" -n 40
```
"""


@dataclass(frozen=True)
class Gguf:
    """Writes the file and proves it.

    Attributes:
        type: of the matrices.
        converter: see `find_converter`.
        runtime: whether llama-cpp-python is there to prove it.
    """

    type: GgufType
    converter: Path
    runtime: bool

    @property
    def file(self) -> str:
        """Name of the file."""
        return f"model-{self.type}.gguf"

    @property
    def packaging(self) -> Packaging:
        """For the model card."""
        return Packaging("gguf", ("gguf", "llama.cpp"), _USE.format(file=self.file), "")

    @property
    def rounded_to(self) -> torch.dtype:
        """Type that the compared model's weights go through: q8_0 is judged against the unrounded ones."""
        return torch.float16 if self.type == "f16" else torch.float32

    def write(self, source: Path, model: PreTrainedModel, folder: Path) -> None:
        """Convert the Transformers folder `source` into `folder`.

        Raises:
            TrainingStopped: llama.cpp does not know this kind of model or tokenizer.
        """
        arguments = [str(source), "--outfile", str(folder / self.file), "--outtype", self.type]
        command = [sys.executable, str(self.converter), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no reason given")
            raise TrainingStopped(f"export: {CONVERTER} failed, nothing was exported: {reason.strip()}")

    def prove(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[str]:
        """Lines of the proof; TrainingStopped if the file is wrong."""
        compare = prove_equal if self.type == "f16" else prove_near
        lines = compare(model, ReadBack(folder / self.file), tokenizer).lines()
        if not self.runtime:
            return [*lines, "llama.cpp: NOT PROVEN in its own runtime, as llama-cpp-python is not installed"]
        runtime = LlamaCpp(folder / self.file)
        runtime.check_tokenizer(tokenizer)
        return [*lines, *compare(model, runtime, tokenizer).lines()]


def has_runtime() -> bool:
    """Whether llama-cpp-python is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


def find_converter(root: str | None) -> Path:
    """llama.cpp's converter in its repository, or in the unpacked sdist of llama-cpp-python, at `root`.

    Raises:
        InputError: it is not there.
    """
    if root is None:
        clone = "git clone --depth 1 https://github.com/ggml-org/llama.cpp"
        raise InputError("--llama-cpp", f"gguf needs llama.cpp's converter: `{clone}`, and name that folder here")
    place = home(root)
    for folder in (place, place / "vendor" / "llama.cpp"):
        if (folder / CONVERTER).is_file():
            return (folder / CONVERTER).resolve()
    raise InputError("--llama-cpp", f"there is no {CONVERTER} in {root}; name the folder of llama.cpp's repository")


class ReadBack:
    """The file as Transformers itself reads it: an additional check, not llama.cpp."""

    name = "read back by Transformers' GGUF loader"

    def __init__(self, file: Path):
        try:
            self._model = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
            ).eval()
        except (*UNREADABLE, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise TrainingStopped(f"export: the file can't be read back, nothing was exported: {reason}") from error

    def greedy(self, prompts: Sequence[Ids], count: int) -> list[Ids]:
        """See `Runtime`."""
        return [greedy(self._model, prompt, count) for prompt in prompts]

    def logits(self, sequences: Sequence[Ids]) -> list[Tensor]:
        """See `Runtime`."""
        return [text_logits(self._model, ids) for ids in sequences]


class LlamaCpp:
    """llama-cpp-python on the CPU, its KV cache in float32."""

    name = "llama.cpp"

    def __init__(self, file: Path):
        import llama_cpp

        self._llama = llama_cpp.Llama(
            str(file), n_ctx=512, logits_all=True, n_gpu_layers=0, type_k=_FLOAT32, type_v=_FLOAT32, verbose=False
        )

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """TrainingStopped if it encodes a prompt otherwise than `tokenizer`."""
        for text in PROMPTS:
            ids = self._llama.tokenize(text.encode(), add_bos=False, special=True)
            if ids != tokenizer(text, add_special_tokens=False)["input_ids"]:
                raise failed(f"{self.name} encodes {text!r} otherwise")

    def greedy(self, prompts: Sequence[Ids], count: int) -> list[Ids]:
        """See `Runtime`."""
        return [self._greedy(prompt, count) for prompt in prompts]

    def _greedy(self, prompt: Ids, count: int) -> Ids:
        self._llama.reset()
        self._llama.eval(prompt)
        added: Ids = []
        while True:
            added.append(int(self._llama.scores[self._llama.n_tokens - 1].argmax()))
            if len(added) == count:
                return added
            self._llama.eval(added[-1:])

    def logits(self, sequences: Sequence[Ids]) -> list[Tensor]:
        """See `Runtime`."""
        return [self._logits(ids) for ids in sequences]

    def _logits(self, ids: Ids) -> Tensor:
        self._llama.reset()
        self._llama.eval(ids)
        return torch.from_numpy(self._llama.scores[: len(ids)].copy())
