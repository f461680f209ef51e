"""Calibration text that also occurs in the validation data is found, across line and block borders."""

from typing import Any

from laco_train.training.overlap import occurring, text_of


def test_found_whatever_the_white_space() -> None:
    text = "It rained.\n\nThe river  rises in the\nnorthern hills. Then it stopped."
    assert occurring(["The river rises in the northern hills.", "It snowed."], text) == [
        "The river rises in the northern hills."
    ]


def test_found_across_blocks(tiny_tokenizer: Any) -> None:
    sentence = "The river rises in the northern hills."
    ids = tiny_tokenizer(f"Before. {sentence} After.")["input_ids"]
    blocks = [ids[:9], [*ids[9:], tiny_tokenizer.eos_token_id]]
    assert occurring([sentence], text_of(blocks, tiny_tokenizer)) == [sentence]
    assert occurring([sentence], text_of(blocks[1:], tiny_tokenizer)) == []
