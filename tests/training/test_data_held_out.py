"""Documents held out of little text: a small book works, else the share that does is named."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from laco_train.errors import InputError
from laco_train.settings import DataSettings
from laco_train.training.data import PackedText


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LACO_TRAIN_CACHE", str(tmp_path / "cache"))


def opened(tokenizer: PreTrainedTokenizerFast, path: Path, **settings: Any) -> PackedText:
    data = PackedText(
        DataSettings(train=str(path), **{"block_size": 16, "batch_size": 1, **settings}), lambda: tokenizer
    )
    data.setup("fit")
    return data


def refused(tokenizer: PreTrainedTokenizerFast, path: Path, **settings: Any) -> str:
    with pytest.raises(InputError) as told:
        opened(tokenizer, path, **settings)
    assert str(told.value).startswith("data.validation: ") and "\n" not in str(told.value)
    return str(told.value)


def named(message: str) -> float:
    found = re.search(r"raise data\.validation_fraction to (0\.\d{1,4})\b", message)
    assert found is not None, message
    return float(found[1])


def texts(seed: int, count: int) -> list[str]:
    """Documents of 4 to 50 tokens or so."""
    draw = random.Random(seed)
    return [f"Town {seed} {i}." + " The river and the sea." * draw.randrange(5) for i in range(count)]


def write(path: Path, values: list[Any], column: str = "text") -> Path:
    path.write_text("".join(json.dumps({column: value}) + "\n" for value in values), encoding="utf-8")
    return path


@pytest.mark.parametrize("block_size", [16, 48])
@pytest.mark.parametrize("seed", range(6))
def test_the_least_fraction_that_works_is_named(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, seed: int, block_size: int
) -> None:
    path = write(tmp_path / "t.jsonl", texts(seed, 20))
    fraction = named(refused(tiny_tokenizer, path, block_size=block_size, validation_fraction=1e-6))
    data = opened(tiny_tokenizer, path, block_size=block_size, validation_fraction=fraction)
    assert len(data.validation_blocks) >= 1 and len(data.train_blocks) >= 1
    less = refused(tiny_tokenizer, path, block_size=block_size, validation_fraction=round(fraction - 1e-4, 4))
    assert named(less) == fraction


def test_conversations_are_padded_so_one_is_enough(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [
        [{"role": "user", "content": f"Where is {i}?"}, {"role": "assistant", "content": "There."}] for i in range(9)
    ]
    path = write(tmp_path / "c.jsonl", turns, "messages")
    chat: dict[str, Any] = {"format": "chat", "block_size": 256}
    fraction = named(refused(tiny_tokenizer, path, validation_fraction=1e-6, **chat))
    data = opened(tiny_tokenizer, path, validation_fraction=fraction, **chat)
    assert data.summary()["validation"]["documents"] == 1


def test_one_document_can_not_be_divided(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "t.jsonl", texts(0, 1) * 5)
    message = refused(tiny_tokenizer, path, block_size=4, validation_fraction=1e-6)
    assert message.endswith("caught none of the 5 documents of data.train; name a validation set")


def test_a_small_book_works(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """One plain file, nothing else given: of 120 documents or so a few are held out."""
    draw = random.Random(0)
    words = ["the", "river", "town", "sea", "hill", "road", "old", "north", "she", "had", "been", "friend"]
    paragraphs = (" ".join(draw.choices(words, k=80)) for _ in range(1400))
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(paragraphs))
    assert 500_000 < path.stat().st_size < 700_000
    data = opened(tiny_tokenizer, path, block_size=1024)
    told = data.summary()
    assert told["validation"]["documents"] >= 1 and told["validation"]["blocks"] >= 1
    assert told["train"]["documents"] > 100


def test_a_validation_set_leaves_a_book_in_long_documents(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "book.txt"
    path.write_text("\n\n".join(f"Line {i} of the river and the sea." for i in range(6000)))
    assert 200_000 < path.stat().st_size < 300_000
    other = write(tmp_path / "v.jsonl", texts(0, 20))
    alone = opened(tiny_tokenizer, path, validation=str(other))
    assert alone.summary()["train"]["documents"] == 3
    (tmp_path / "book2.txt").write_text(path.read_text().replace("river", "hill"))
    both = opened(tiny_tokenizer, tmp_path / "book*.txt", validation=str(path), sweep_fraction=0.01)
    assert both.summary()["train"]["duplicates"] == 3  # cut alike, so known again
