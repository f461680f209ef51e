"""PackedText: hold-out, duplicates, the cache, streaming, batches, and what is said about bad data."""

import hashlib
import json
import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from laco_train.errors import InputError, TrainingStopped
from laco_train.settings import DataSettings
from laco_train.training.cache import tokenizer_identity
from laco_train.training.data import PackedText
from tests.oracles.packing import packed_text

CHAT = [{"role": "user", "content": "Which river?"}, {"role": "assistant", "content": "The old one."}]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LACO_TRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(path: Path, values: list[Any], column: str = "text") -> str:
    path.write_text("".join(json.dumps({column: value}) + "\n" for value in values), encoding="utf-8")
    return str(path)


def texts(count: int, start: int = 0) -> list[str]:
    return [f"Document {i} of the river and the sea." for i in range(start, start + count)]


def opened(tokenizer: Any, **settings: Any) -> PackedText:
    values = {"block_size": 16, "batch_size": 2, "validation_fraction": 0.3, **settings}
    data = PackedText(DataSettings(**values), lambda: tokenizer)
    data.setup("validate")
    return data


def documents(data: PackedText, tokenizer: PreTrainedTokenizerFast, role: str) -> list[str]:
    """Whole documents in the blocks of `role`, the last one perhaps cut."""
    ids = [i for block in getattr(data, f"{role}_blocks") for i in block["input_ids"]]
    return [text for text in tokenizer.decode(ids).split("<|endoftext|>") if text]


def held_out(text: str, fraction: float) -> bool:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) / 2**256 < fraction


def test_blocks_are_the_oracles_and_batches_are_int64(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    train, validation = texts(40), texts(40, start=100)
    data = opened(
        tiny_tokenizer,
        train=write(tmp_path / "t.jsonl", train),
        validation=write(tmp_path / "v.jsonl", validation),
    )
    for blocks, source in ((data.train_blocks, train), (data.validation_blocks, validation)):
        ids = [[*tiny_tokenizer.encode(text, add_special_tokens=False), tiny_tokenizer.eos_token_id] for text in source]
        expected = packed_text(ids, 16)
        columns = ("input_ids", "labels", "position_ids")
        assert [list(zip(*(b[c].tolist() for c in columns), strict=True)) for b in blocks] == expected
    assert data.train_blocks.features["input_ids"].feature.dtype == "int32"
    batch = next(iter(data.train_dataloader()))
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in batch.items()} == {
        name: (torch.int64, (2, 16)) for name in ("input_ids", "labels", "position_ids")
    }
    seen = torch.cat([batch["input_ids"] for batch in data.val_dataloader()])
    assert seen.tolist() == [b["input_ids"].tolist() for b in data.validation_blocks]
    assert data.batches_per_epoch == len(data.train_blocks) // 2
    assert data.tokens_per_epoch == data.batches_per_epoch * 32


def test_held_out_documents_are_those_of_the_hash(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    source = texts(60) + texts(30)  # half of them twice
    data = opened(tiny_tokenizer, train=write(tmp_path / "t.jsonl", source))
    train, validation = (documents(data, tiny_tokenizer, role) for role in ("train", "validation"))
    assert train[:-1] == [text for text in source if not held_out(text, 0.3)][: len(train) - 1]
    assert validation[:-1] == [text for text in source if held_out(text, 0.3)][: len(validation) - 1]
    assert len(train) > 40 and len(validation) > 15
    assert not set(train[:-1]) & set(validation[:-1])


def test_documents_of_validation_are_dropped_from_train(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    data = opened(
        tiny_tokenizer,
        train=write(tmp_path / "t.jsonl", [*texts(40), texts(1)[0]]),
        validation=write(tmp_path / "v.jsonl", [*texts(5), *texts(5, start=100)]),
    )
    assert documents(data, tiny_tokenizer, "train")[0] == texts(1, start=5)[0]
    summary = data.summary()
    assert summary["train"]["duplicates"] == 6
    assert summary["train"]["documents"] == 35 and summary["validation"]["documents"] == 10
    assert summary["train"]["tokens"] == 16 * len(data.train_blocks)


def test_the_summarys_hash_is_that_of_the_blocks(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    data = opened(tiny_tokenizer, train=write(tmp_path / "t.jsonl", texts(60)))
    sha = hashlib.sha256()
    for block in data.train_blocks:
        for column in ("input_ids", "labels", "position_ids"):
            sha.update(block[column].astype("int32").tobytes())
    assert data.summary()["train"]["sha256"] == sha.hexdigest()
    assert "digests" not in data.summary()["validation"]


class Sealed(PreTrainedTokenizerFast):
    """A tokenizer that must not be asked to tokenise."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("tokenised")


def sealed(tokenizer: PreTrainedTokenizerFast, eos_token: str = "<|endoftext|>") -> Sealed:
    return Sealed(tokenizer_object=tokenizer.backend_tokenizer, eos_token=eos_token, pad_token="<|pad|>")


def test_a_second_setup_does_not_tokenise(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    settings: dict[str, Any] = {"train": write(tmp_path / "t.jsonl", texts(60))}
    first = PackedText(
        DataSettings(**settings, block_size=16, batch_size=2, validation_fraction=0.3), lambda: tiny_tokenizer
    )
    first.prepare_data()
    first.setup("fit")
    tiny_tokenizer(["a", "longer text"], padding=True, truncation=True)  # leaves its mark on the backend
    tiny_tokenizer_again = sealed(tiny_tokenizer)
    again = opened(tiny_tokenizer_again, **settings)
    assert again.summary() == first.summary()
    assert again.train_blocks["input_ids"][:].tolist() == first.train_blocks["input_ids"][:].tolist()


@pytest.mark.parametrize(
    "change",
    [{"block_size": 8}, {"max_tokens": 64}, {"column": "body"}, {"validation_fraction": 0.4}, {"file": 1}, {"eos": 1}],
)
def test_whatever_matters_makes_a_new_cache(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, change: dict[str, Any]
) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": t, "body": t}) + "\n" for t in texts(60)))
    opened(tiny_tokenizer, train=str(path))
    if change.pop("file", None):
        path.write_text(path.read_text() + json.dumps({"text": "One more."}) + "\n")
    tokenizer = sealed(tiny_tokenizer, eos_token="<|im_end|>" if change.pop("eos", None) else "<|endoftext|>")
    with pytest.raises(Exception, match="generating the dataset") as caught:
        opened(tokenizer, train=str(path), **change)
    assert str(caught.value.__cause__) == "tokenised"


def test_the_chat_template_matters_to_chat_only(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    bare = sealed(tiny_tokenizer)
    assert tokenizer_identity(bare, chat=False) == tokenizer_identity(tiny_tokenizer, chat=False)
    assert tokenizer_identity(bare, chat=True) != tokenizer_identity(tiny_tokenizer, chat=True)


def test_the_special_tokens_that_a_chat_template_renders_matter(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    def beginning_with(token: str) -> PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast(
            tokenizer_object=tiny_tokenizer.backend_tokenizer,
            bos_token=token,
            eos_token="<|endoftext|>",
            chat_template="{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
        )

    one, other = beginning_with("<|im_start|>"), beginning_with("<|pad|>")
    assert one.apply_chat_template(CHAT, tokenize=False) != other.apply_chat_template(CHAT, tokenize=False)
    assert tokenizer_identity(one, chat=True) != tokenizer_identity(other, chat=True)


def test_reading_stops_at_max_tokens(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "t.jsonl"
    write(path, texts(1200))
    path.write_text(path.read_text() + "broken\n")
    data = opened(tiny_tokenizer, train=str(path), max_tokens=170, validation_max_tokens=64)
    assert len(data.train_blocks) == 10 and len(data.validation_blocks) == 4
    with pytest.raises(InputError, match=r"data\.train: .*line 1201 is not JSON"):
        opened(tiny_tokenizer, train=str(path), validation_max_tokens=64)


def test_a_failed_packing_leaves_nothing_to_be_found(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "' + "word " * 100 + '"}\nbroken\n')
    for _ in range(2):
        with pytest.raises(InputError, match="line 2 is not JSON"):
            opened(tiny_tokenizer, train=str(path))
    assert not list(tmp_path.rglob("*.arrow")) and not list(tmp_path.rglob("summary.json"))


@pytest.mark.parametrize("content", [b"", b'{"documents": 41, "tok', b"\xff", b"null", b"{}x", None])
def test_a_summary_that_cant_be_read_is_packed_again(
    tmp_path: Path, own_cache: Path, tiny_tokenizer: PreTrainedTokenizerFast, content: bytes | None
) -> None:
    path = write(tmp_path / "t.jsonl", texts(60))
    first = opened(tiny_tokenizer, train=path)
    summaries = list(own_cache.rglob("summary.json"))
    assert len(summaries) == 2
    for file in summaries:
        file.unlink() if content is None else file.write_bytes(content)
    for _ in range(2):
        assert opened(tiny_tokenizer, train=path).summary() == first.summary()
    opened(sealed(tiny_tokenizer), train=path)


@pytest.mark.parametrize("cache", ["file", "file/below", "missing/but/can/be/made"])
def test_a_cache_that_cant_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: PreTrainedTokenizerFast, cache: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LACO_TRAIN_CACHE", str(tmp_path / cache))
    path = write(tmp_path / "t.jsonl", texts(60))
    if cache.startswith("missing"):
        assert len(opened(tiny_tokenizer, train=path).train_blocks) > 0
        return
    with pytest.raises(InputError, match=r"^data\.train: can't keep its blocks in .*file.*set LACO_TRAIN_CACHE"):
        opened(tiny_tokenizer, train=path)


def test_a_full_disk_stops_with_a_line(
    tmp_path: Path, own_cache: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write(tmp_path / "t.jsonl", texts(600))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(TrainingStopped, match=r"^can't write .*packed.* \(.*File too large.*\).*LACO_TRAIN_CACHE"):
            opened(tiny_tokenizer, train=path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(own_cache.rglob("*.arrow"))
    assert len(opened(tiny_tokenizer, train=path).train_blocks) > 0


def test_chat_is_packed_whole_and_counts_what_it_skips(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "c.jsonl", [CHAT, CHAT[:1], CHAT, CHAT, CHAT], column="messages")
    other = write(tmp_path / "v.jsonl", [[CHAT[0], {"role": "assistant", "content": "No."}]], column="messages")
    length = len(tiny_tokenizer(tiny_tokenizer.apply_chat_template(CHAT, tokenize=False))["input_ids"])
    data = opened(tiny_tokenizer, train=path, validation=other, format="chat", block_size=2 * length + 5, batch_size=1)
    assert len(data.train_blocks) == 2
    for block in data.train_blocks:
        assert block["input_ids"][-5:].tolist() == [tiny_tokenizer.eos_token_id] * 5
        assert block["position_ids"].tolist() == [*range(length), *range(length), *range(5)]
        assert (block["labels"][-5:] == -100).all() and (block["labels"] != -100).any()
    assert data.summary()["train"] | {"sha256": ""} == {
        "documents": 4, "tokens": 4 * length, "blocks": 2, "duplicates": 0, "skipped": 1, "sha256": ""
    }  # fmt: skip


def test_documents_are_those_that_begin_in_a_block(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """The packer reads a conversation more than the last block holds, and text beyond it."""
    chat = write(tmp_path / "c.jsonl", [CHAT] * 9, column="messages")
    other = write(tmp_path / "v.jsonl", [[CHAT[0], {"role": "assistant", "content": "No."}]] * 9, column="messages")
    length = len(tiny_tokenizer(tiny_tokenizer.apply_chat_template(CHAT, tokenize=False))["input_ids"])
    size = 2 * length + 5
    limits: dict[str, Any] = {"max_tokens": 2 * size, "validation_max_tokens": size}
    data = opened(tiny_tokenizer, train=chat, validation=other, format="chat", block_size=size, batch_size=1, **limits)
    assert [data.summary()[role]["documents"] for role in ("train", "validation")] == [4, 2]
    assert [data.summary()[role]["blocks"] for role in ("train", "validation")] == [2, 1]

    source = texts(3)
    lengths = [len(tiny_tokenizer(text)["input_ids"]) + 1 for text in source]
    path, valid = write(tmp_path / "t.jsonl", source), write(tmp_path / "w.jsonl", texts(9, start=50))
    short = opened(tiny_tokenizer, train=path, validation=valid, block_size=sum(lengths[:2]), batch_size=1)
    assert short.summary()["train"]["documents"] == 2


ASK = {"train": "ask.jsonl", "format": "chat", "block_size": 64}


def cases() -> Iterator[Any]:
    yield "empty", {"train": "empty.txt"}, r"data\.train: holds no text"
    yield "blank", {"train": "blank.jsonl"}, r"data\.train: holds no text"
    yield "missing", {"train": "none.txt"}, r"data\.train: no file matches"
    yield "missing validation", {"validation": "none.txt"}, r"data\.validation: no file matches"
    yield "empty validation", {"validation": "empty.txt"}, r"data\.validation: holds no text"
    yield "short", {"train": "short.jsonl", "validation": "t.jsonl"}, r"data\.train: holds \d+ tokens, less than one"
    yield "short, held out", {"train": "short.jsonl", "block_size": 999}, r"data\.(train|validation): "
    yield "short validation", {"validation": "short.jsonl"}, r"data\.validation: holds \d+ tokens.*name more text"
    yield "short held out", {"block_size": 300}, r"data\.validation: holds \d+ tokens.*raise data\.validation_fraction"
    yield "none held out", {"validation_fraction": 1e-9}, r"data\.validation: the share of 1e-09 .* caught none of"
    yield "all held out", {"validation_fraction": 1 - 1e-9}, r"data\.validation: the share of .* caught all"
    yield "same text", {"validation": "t.jsonl"}, r"data\.validation: holds all of the 30 documents of data\.train"
    yield "column", {"column": "body"}, r"data\.column: .*t\.jsonl, line 1 has no column 'body'; it has: text"
    yield "not text", {"train": "numbers.jsonl"}, r"data\.column: .*numbers\.jsonl, line 1 holds int, not text"
    yield "hub without a bound", {"train": "owner/name"}, r"data\.max_tokens: is null"
    yield (
        "hub validation without a bound",
        {"validation": "owner/name", "validation_max_tokens": None},
        r"data\.validation_max_tokens: is null",
    )
    yield "hub", {"train": "owner/name", "max_tokens": 64}, r"data\.train: 'owner/name' is no file here.*connection"
    yield "hub configuration", {"train": "owner/name:en", "max_tokens": 64}, r"data\.train: 'owner/name:en' is no file"
    yield "chat of .txt", {"train": "empty.txt", "format": "chat"}, r"data\.format: .*plain text; use JSONL"
    yield "chat column", {"format": "chat"}, r"data\.column: .*has no column 'messages'"
    yield "chat of text", {"format": "chat", "column": "text"}, r"data\.column: .*has no column 'messages'"
    yield "chat without answers", {**ASK, "validation": "chat.jsonl"}, r"data\.train: none of 3 conversations"
    yield "batch", {"batch_size": 1000}, r"data\.batch_size: \d+ blocks make no batch of 1000 for each of 1 devices"


@pytest.mark.parametrize(("settings", "said"), [pytest.param(s, e, id=name) for name, s, e in cases()])
def test_bad_data(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_tokenizer: PreTrainedTokenizerFast,
    settings: dict[str, Any],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    write(Path("blank.jsonl"), ["", " \n", None])
    write(Path("short.jsonl"), ["a", "b", "c"])
    write(Path("numbers.jsonl"), [1, 2])
    write(Path("t.jsonl"), texts(30))
    write(Path("ask.jsonl"), [CHAT[:1], [*CHAT[:1], *CHAT[:1]], [{"role": "user", "content": "Why?"}]], "messages")
    write(Path("chat.jsonl"), [[{"role": "user", "content": "Hm?"}, CHAT[1]]], "messages")
    with pytest.raises(InputError, match=f"^{said}"):
        opened(tiny_tokenizer, **{"train": "t.jsonl", **settings})


def test_tokenizers_that_will_not_do(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "t.jsonl", texts(30))
    with pytest.raises(InputError, match=r"model\.source: its tokenizer has no end-of-text token"):
        opened(PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer), train=path)
    with pytest.raises(InputError, match=r"data\.format: chat needs a tokenizer with a chat template"):
        opened(sealed(tiny_tokenizer), train=path, format="chat")


def test_settings_are_not_shared(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Seeds change the order alone."""
    path = write(tmp_path / "t.jsonl", texts(60))
    one, two = (opened(tiny_tokenizer, train=path, seed=seed) for seed in (0, 1))
    assert one.summary() == two.summary()
    batches = [[b["input_ids"].tolist() for b in data.train_dataloader()] for data in (one, two)]
    assert batches[0] != batches[1]
    assert replace(one.settings, seed=1) == two.settings
