"""Blocks of conversations are padded with a token that the model has an embedding of."""

import copy

from transformers import PreTrainedTokenizerFast

from tests.cli.conftest import project
from tests.cli.runs import Project, write_lines

__all__ = ["project"]


def test_a_pad_token_without_an_embedding_is_not_used(
    project: Project, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    added = copy.deepcopy(tiny_tokenizer)
    added.add_special_tokens({"pad_token": "<pad>"})
    assert added.pad_token_id == len(tiny_tokenizer)  # as many embeddings as the model has
    added.save_pretrained(project.root / "model")
    turns = [
        [{"role": "user", "content": f"Where is town {i}?"}, {"role": "assistant", "content": f"By river {i}."}]
        for i in range(40)
    ]
    write_lines(project.root / "chat.jsonl", turns[:30], "messages")
    write_lines(project.root / "held_out.jsonl", turns[30:], "messages")
    data = ["--data.format=chat", "--data.train=chat.jsonl", "--data.validation=held_out.jsonl"]
    run = project.fit(*data, "--data.block_size=80")
    told = run.summary()["data"]["train"]
    assert told["tokens"] < 80 * told["blocks"]
    assert run.validation()[-1] < run.validation()[0]
