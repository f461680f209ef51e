"""Greedy continuations, whatever a model's own settings say."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from laco_train.errors import InputError
from laco_train.evaluation.samples import PROMPTS, check_prompts, continuations, read_prompts
from tests.collapse.tiny import tiny

Builder = Callable[..., LlamaForCausalLM]


def greedy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, new: int) -> str:
    """Most likely tokens one after another, without a cache."""
    ids = tokenizer(prompt)["input_ids"]
    begin = len(ids)
    for _ in range(new):
        with torch.no_grad():
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == tokenizer.eos_token_id:
            break
    return str(tokenizer.decode(ids[begin:], skip_special_tokens=True))


def test_continuations_are_greedy_and_the_models_settings_are_left_out(
    tiny_llama: Builder, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_llama(layers=3)
    expected = [greedy(model, tiny_tokenizer, prompt, 12) for prompt in PROMPTS[:3]]
    model.generation_config.do_sample = True
    model.generation_config.temperature = 5.0
    model.generation_config.repetition_penalty = 9.0
    assert continuations(model, tiny_tokenizer, PROMPTS[:3], new_tokens=12) == expected
    assert len(set(expected)) > 1
    assert model.generation_config.temperature == 5.0


def test_a_prompt_that_a_model_has_no_positions_for_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Of learned positions; the last prompt that fits is written after."""
    model, words = tiny("gpt2"), tiny_tokenizer("river" * 300)["input_ids"]
    long, fits = (tiny_tokenizer.decode(words[:tokens]) for tokens in (193, 192))
    assert [len(tiny_tokenizer(text)["input_ids"]) for text in (long, fits)] == [193, 192]
    with pytest.raises(InputError, match=r"^--prompts: prompt 2 is 193 tokens, .* 64 new ones .* 256 positions"):
        check_prompts(["a", long], tiny_tokenizer, 256)
    check_prompts(["a", fits], tiny_tokenizer, 256)
    assert len(continuations(model, tiny_tokenizer, ["a", fits])) == 2


def test_prompts_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("One\n\nTwo\\nlines\n", encoding="utf-8")
    assert read_prompts(file) == ("One", "Two\nlines")
    file.write_text("\n \n")
    with pytest.raises(InputError, match=r"^--prompts: .* holds no prompt"):
        read_prompts(file)
    with pytest.raises(InputError, match=r"^--prompts: .*none.txt can't be read"):
        read_prompts(tmp_path / "none.txt")
