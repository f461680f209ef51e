"""Reading files and data sets as streams, and what is said when that fails."""

import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from laco_train.errors import InputError
from laco_train.training.sources import HubSet, cut_finely, cut_text, resolve

TEXTS = ["First.", "Second,\nof two lines.", "Third: é 山"]


def lines(texts: list[str], column: str = "text") -> bytes:
    return "".join(json.dumps({"n": 1, column: text}) + "\n" for text in texts).encode()


def write(folder: Path, suffix: str) -> Path:
    path = folder / f"corpus{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"n": [1, 2, 3], "text": TEXTS}), path)
    elif suffix == ".txt":
        path.write_text("\n\n".join(TEXTS), encoding="utf-8")
    else:
        path.write_bytes(gzip.compress(lines(TEXTS)) if suffix.endswith(".gz") else lines(TEXTS))
    return path


def read(names: str | list[str], column: str = "text") -> list[str]:
    return [row.value for source in resolve("data.train", names) for row in source.rows(column)]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json.gz", ".parquet"])
def test_every_kind_of_file_gives_its_documents(tmp_path: Path, suffix: str) -> None:
    assert read(str(write(tmp_path, suffix))) == TEXTS


def test_a_text_file_gives_documents_of_whole_paragraphs(tmp_path: Path) -> None:
    assert read(str(write(tmp_path, ".txt"))) == ["\n\n".join(TEXTS)]
    assert list(cut_text(io.StringIO("aa\n\nbb\n\ncc dd\nee"), limit=6)) == ["aa\n\nbb", "cc dd", "ee"]


@given(text=st.text(alphabet="ab \n", max_size=200), limit=st.integers(1, 30))
def test_cut_text_loses_nothing_but_newlines(text: str, limit: int) -> None:
    documents = list(cut_text(io.StringIO(text), limit))
    assert all(len(document) <= limit for document in documents)
    assert "".join(documents).replace("\n", "") == text.replace("\n", "")


@pytest.mark.parametrize(
    ("sizes", "most"),
    [([500], 5_000), ([900_000], 5_000), ([4_000_000], 20_000), ([6_000_000, 6_000_000], 60_000)],
)
def test_little_plain_text_is_cut_finely(tmp_path: Path, sizes: list[int], most: int) -> None:
    for i, size in enumerate(sizes):
        (tmp_path / f"{i}.txt").write_text(("x" * 98 + "\n\n") * (size // 100))
    whole = resolve("data.train", str(tmp_path / "*.txt"))
    cut = cut_finely(whole)
    longest = max(len(row.value) for source in cut for row in source.rows("text"))
    assert longest <= most and (sum(sizes) < most or longest > 0.9 * most)
    assert all(one.identity() != other.identity() for one, other in zip(cut, whole, strict=True))


def test_other_text_is_not_cut_finely(tmp_path: Path) -> None:
    (tmp_path / "large.txt").write_text(("x" * 99 + "\n") * 200_000)
    (tmp_path / "small.txt").write_text("A line.\n")
    write(tmp_path, ".jsonl")
    for names in (["large.txt"], ["small.txt", "corpus.jsonl"]):
        sources = resolve("data.train", [str(tmp_path / name) for name in names])
        assert cut_finely(sources) == sources


def test_globs_lists_and_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("b", "a"):
        (tmp_path / "data" / f"{name}.jsonl").write_bytes(lines([name]))
    (tmp_path / "here.jsonl").write_bytes(lines(["here"]))
    assert read("b.jsonl") == ["b"]
    assert read("*.jsonl") == ["here"]
    assert read(["data/*.jsonl", "here.jsonl"]) == ["a", "b", "here"]
    assert read("?.jsonl") == ["a", "b"]


def test_a_hub_set_is_streamed(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_bytes(lines(TEXTS))
    rows = HubSet("data.train", str(tmp_path / "set"), None).rows("text")
    assert [row.value for row in rows] == TEXTS


@pytest.mark.parametrize("end", [b'{"text": "b"', gzip.compress(lines(TEXTS))[:-12]], ids=["JSON", "archive"])
def test_a_hub_set_that_breaks_midway(tmp_path: Path, end: bytes) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train-0.jsonl").write_bytes(lines(TEXTS))
    (tmp_path / "set" / f"train-1.jsonl{'.gz' if end[:1] != b'{' else ''}").write_bytes(end)
    rows = HubSet("data.train", str(tmp_path / "set"), None).rows("text")
    assert [next(rows).value for _ in TEXTS] == TEXTS
    with pytest.raises(InputError, match=r"^data\.train: .*/set broke off after row 3 \("):
        next(rows)


def test_a_hub_set_without_the_column(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_bytes(lines(TEXTS))
    with pytest.raises(InputError, match=r"^data\.column: .*no column 'body'; it has: n, text"):
        next(HubSet("data.train", str(tmp_path / "set"), None).rows("body"))


def test_names_of_hub_sets() -> None:
    assert resolve("data.train", ["wikitext:wikitext-2-raw-v1", "owner/name"]) == [
        HubSet("data.train", "wikitext", "wikitext-2-raw-v1"),
        HubSet("data.train", "owner/name", None),
    ]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing.txt", "no file matches 'missing.txt'"),
        ("missing/*.jsonl", "no file matches"),
        ("folder", r"is a folder; name its files, such as 'folder/\*\.jsonl'"),
        ("table.csv", r"is none of \.txt, .*convert"),
        ("owner/name", "gave no such data set.*check the name, the connection"),
        ("broken.jsonl", "broken.jsonl, line 3 is not JSON"),
        ("list.jsonl", "list.jsonl, line 1 is not a JSON object"),
        ("digits.jsonl", "digits.jsonl, line 2 is not JSON"),
        ("nested.jsonl", "nested.jsonl, line 1 is not JSON"),
        ("latin.txt", "latin.txt can't be read"),
        ("cut.jsonl.gz", "cut.jsonl.gz can't be read"),
        ("plain.jsonl.gz", "plain.jsonl.gz can't be read"),
        ("no.parquet", "no.parquet can't be read"),
    ],
)
def test_bad_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "table.csv").write_text("a,b")
    (tmp_path / "broken.jsonl").write_bytes(lines(["a"]) + b'\n{"text": "b"\n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "digits.jsonl").write_bytes(lines(["a"]) + b'{"text": "b", "n": ' + b"9" * 5000 + b"}\n")
    (tmp_path / "nested.jsonl").write_bytes(b"[" * 100_000 + b"\n")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS))[:-12])
    (tmp_path / "plain.jsonl.gz").write_bytes(lines(TEXTS))
    (tmp_path / "no.parquet").write_text("no")
    with pytest.raises(InputError, match=f"^data.validation: .*{said}"):
        for source in resolve("data.validation", name):
            list(source.rows("text"))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_missing_column_names_those_there(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(InputError, match=r"data\.column: .*no column 'body'; it has: n, text"):
        read(str(write(tmp_path, suffix)), column="body")


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "half.jsonl").write_text('{"text": "a\\uD83Db"}\n{"text": "\\ud83d\\ude00"}\n')
    assert read(str(tmp_path / "half.jsonl")) == ["a?b", "\N{GRINNING FACE}"]
