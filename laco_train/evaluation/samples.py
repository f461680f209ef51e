"""What a model writes: greedy continuations of the same prompts."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from laco_train.errors import InputError

PROMPTS = (
    "The capital of France is",
    "Water boils when",
    "Once upon a time, in a village by the sea,",
    "To make a cup of tea, first",
    "The main difference between a virus and a bacterium is that",
)
NEW_TOKENS = 64


def read_prompts(path: Path) -> tuple[str, ...]:
    """Prompts of a text file, one a line; ``\\n`` in a line stands for a line break.

    Raises:
        InputError: the file can't be read, or holds none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            "--prompts", f"{path} can't be read ({error}); name a text file with a prompt a line"
        ) from None
    prompts = tuple(line.replace("\\n", "\n") for line in lines if line.strip())
    if not prompts:
        raise InputError("--prompts", f"{path} holds no prompt; write one a line")
    return prompts


def check_prompts(
    prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, positions: int | None, key: str = "--prompts"
) -> None:
    """Refuse prompts that, with NEW_TOKENS each, don't fit a model of so many `positions` (None: unknown)."""
    for number, prompt in enumerate(prompts, start=1):
        tokens = len(tokenizer(prompt, verbose=False)["input_ids"])
        if positions is not None and tokens + NEW_TOKENS > positions:
            problem = f"prompt {number} is {tokens:,} tokens, with {NEW_TOKENS} new ones more than the model's"
            raise InputError(key, f"{problem} {positions:,} positions; shorten it")


@torch.no_grad()  # weights that train on must not meet tensors of inference mode
def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    new_tokens: int = NEW_TOKENS,
    on_prompt: Callable[[int, int], None] | None = None,
) -> list[str]:
    """What `model` writes after each prompt: greedy, at most `new_tokens`, without a chat template, one at a time.

    Settings that come with the model (temperature, penalties) are left out, so that all models are asked alike.
    """
    own = model.generation_config
    end = getattr(own, "eos_token_id", None)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=new_tokens,
        eos_token_id=tokenizer.eos_token_id if end is None else end,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    written: list[str] = []
    try:
        model.generation_config = config  # what a call leaves open is filled from here
        for prompt in prompts:
            inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            output: Any = model.generate(input_ids=ids, attention_mask=mask)  # type: ignore[operator]
            written.append(str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)))
            if on_prompt is not None:
                on_prompt(len(written), len(prompts))
    finally:
        model.generation_config = own
    return written
