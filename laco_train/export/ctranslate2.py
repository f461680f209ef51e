"""CTranslate2: a folder for its Generator, float32 weights."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from laco_train.errors import TrainingStopped
from laco_train.export.card import Packaging
from laco_train.export.runtime_proof import Ids, prove_equal

PACKAGES = ("ctranslate2",)


class Ctranslate2:
    """Writes the folder and proves it."""

    packaging = Packaging(
        "ctranslate2",
        ("ctranslate2",),
        """CTranslate2 (`pip install ctranslate2 transformers`).

```python
import ctranslate2
from transformers import AutoTokenizer

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder)
generator = ctranslate2.Generator(folder, compute_type="float32")
tokens = tokenizer.convert_ids_to_tokens(tokenizer("The river rises in").input_ids)
result = generator.generate_batch([tokens], max_length=40, sampling_topk=1)[0]
print(tokenizer.decode(result.sequences_ids[0]))
```
""",
        "",
    )
    rounded_to = torch.float32

    def write(self, source: Path, model: PreTrainedModel, folder: Path) -> None:
        """Convert the Transformers folder `source` into `folder`.

        Raises:
            TrainingStopped: CTranslate2 does not know this kind of model.
        """
        from ctranslate2.converters import TransformersConverter

        aside = folder / ".ctranslate2"  # it wants a folder that it makes itself
        try:
            TransformersConverter(str(source)).convert(str(aside), quantization="float32")
        except ValueError as error:
            raise TrainingStopped(f"export: ctranslate2 can't convert this model: {error}") from error
        for path in aside.iterdir():
            path.rename(folder / path.name)
        aside.rmdir()
        _name_all_tokens(folder / "config.json")

    def prove(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> list[str]:
        """Lines of the proof; TrainingStopped if there is none."""
        return prove_equal(model, Generator(folder, tokenizer), tokenizer).lines()


class Generator:
    """ctranslate2.Generator on the folder that was written."""

    name = "ctranslate2"

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase):
        import ctranslate2

        self._tokens = tokenizer.convert_ids_to_tokens
        self._generator = ctranslate2.Generator(str(folder), device="cpu", compute_type="float32")

    def greedy(self, prompts: Sequence[Ids], count: int) -> list[Ids]:
        """See `Runtime`."""
        results = self._generator.generate_batch(
            [self._tokens(prompt) for prompt in prompts],
            max_length=count,
            sampling_topk=1,
            include_prompt_in_result=False,
            end_token=[],  # go on after the end of a text
        )
        return [result.sequences_ids[0] for result in results]

    def logits(self, sequences: Sequence[Ids]) -> list[Tensor]:
        """See `Runtime`; one sequence after another, as it pads."""
        found = [self._generator.forward_batch([ids], return_log_probs=False) for ids in sequences]
        return [torch.from_numpy(np.array(one))[0] for one in found]


def _name_all_tokens(path: Path) -> None:
    """A tokenizer without a BOS or unknown token leaves nulls, which the runtime refuses; it then uses neither."""
    values = json.loads(path.read_text(encoding="utf-8"))
    names = {
        key: values["eos_token"] or "" for key, value in values.items() if key.endswith("_token") and value is None
    }
    path.write_text(json.dumps(values | names, indent=2) + "\n", encoding="utf-8")
