"""The loss mask of conversations."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from laco_train.errors import InputError
from laco_train.training.encode import encode_conversations
from laco_train.training.packing import IGNORED
from laco_train.training.sources import Row

USER = {"role": "user", "content": "Which river?"}
ANSWER = {"role": "assistant", "content": "The river of the hills.\n"}
SYSTEM = {"role": "system", "content": "Be brief."}
MORE = [{"role": "user", "content": "assistant"}, {"role": "assistant", "content": "\nYes."}]

GENERATION = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FORGETFUL = (  # shows an answer only while it is the last message, as templates that drop earlier thinking do
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] != 'assistant' or loop.last %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=template,
    )


def learned(tokenizer: PreTrainedTokenizerFast, messages: Any, block_size: int = 1000) -> tuple[str, list[str]]:
    """The whole text, and each run of tokens with labels as text."""
    ((ids, labels),) = encode_conversations(tokenizer, [Row(messages, "chat.jsonl, line 1")], block_size)
    runs: list[list[int]] = []
    for i, (token, label) in enumerate(zip(ids, labels, strict=True)):
        if label != IGNORED:
            assert label == token
            if i == 0 or labels[i - 1] == IGNORED:
                runs.append([])
            runs[-1].append(token)
    return tokenizer.decode(ids), [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("template", [None, GENERATION], ids=["prefixes", "generation marks"])
def test_loss_is_on_the_assistants_turns_and_their_end(
    tiny_tokenizer: PreTrainedTokenizerFast, template: str | None
) -> None:
    tokenizer = with_template(tiny_tokenizer, template) if template else tiny_tokenizer
    messages = [SYSTEM, USER, ANSWER, *MORE]
    text, runs = learned(tokenizer, messages)
    assert text == tokenizer.apply_chat_template(messages, tokenize=False)
    assert runs == ["The river of the hills.\n<|im_end|>", "\nYes.<|im_end|>"]


def test_an_end_of_turn_without_a_special_token_is_learned(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    _, runs = learned(
        with_template(tiny_tokenizer, template), [USER, MORE[0], {"role": "assistant", "content": "Yes."}]
    )
    assert runs == ["Yes.\n"]


def test_a_long_conversation_is_cut(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    _, whole = learned(tiny_tokenizer, [USER, ANSWER])
    ((ids, _),) = encode_conversations(tiny_tokenizer, [Row([USER, ANSWER], "x")], 1000)
    _, runs = learned(tiny_tokenizer, [USER, ANSWER], block_size=len(ids) - 3)
    assert len(runs) == 1 and whole[0].startswith(runs[0]) and whole[0] != runs[0]


@pytest.mark.parametrize("messages", [[USER], [ANSWER, USER]], ids=["no answer", "an answer to nobody"])
def test_nothing_to_learn(tiny_tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]]) -> None:
    assert learned(tiny_tokenizer, messages)[1] == []


def test_a_template_that_rewrites_turns_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = with_template(tiny_tokenizer, FORGETFUL)
    assert learned(tokenizer, [USER, ANSWER])[1] == ["The river of the hills.\n<|im_end|>"]
    with pytest.raises(InputError, match=r"data\.format.*message 2 of chat\.jsonl, line 1"):
        learned(tokenizer, [USER, ANSWER, *MORE])


def test_a_template_that_raises_is_reported(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InputError, match=r"data\.format.*line 1.*roles must alternate"):
        learned(with_template(tiny_tokenizer, template), [USER, ANSWER])
    with pytest.raises(InputError, match=r"data\.format.*line 1.*roles must alternate"):
        learned(with_template(tiny_tokenizer, template + "{% generation %}{% endgeneration %}"), [USER, ANSWER])


@pytest.mark.parametrize("template", [None, GENERATION], ids=["prefixes", "generation marks"])
def test_content_that_is_no_text_for_the_template_is_reported(
    tiny_tokenizer: PreTrainedTokenizerFast, template: str | None
) -> None:
    tokenizer = with_template(tiny_tokenizer, template) if template else tiny_tokenizer
    parts = [{"role": "user", "content": [{"type": "text", "text": "Which river?"}]}, ANSWER]
    with pytest.raises(InputError, match=r"^data\.format: the chat template refuses chat\.jsonl, line 1 \(.*list"):
        learned(tokenizer, parts)


@pytest.mark.parametrize("messages", ["text", [], [{"role": "user"}], ["hi"]])
def test_what_is_no_conversation_is_refused(tiny_tokenizer: PreTrainedTokenizerFast, messages: Any) -> None:
    with pytest.raises(InputError, match=r"data\.format: chat\.jsonl, line 1"):
        learned(tiny_tokenizer, messages)
