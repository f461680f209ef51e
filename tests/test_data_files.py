"""The shipped texts are what data/README.md says."""

import gzip
import hashlib
import json
import re
from pathlib import Path

import pytest

DATA = Path(__file__).parent.parent / "data"
CALIBRATION = ["calibration_en.txt", "calibration_zh.txt"]
NOVELS = [
    "Sense and Sensibility (1811)",
    "Pride and Prejudice (1813)",
    "Mansfield Park (1814)",
    "Emma (1815)",
    "Northanger Abbey (1817)",
    "Persuasion (1817)",
]


def read_lines(name: str) -> list[str]:
    return (DATA / name).read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def corpus() -> list[dict[str, str]]:
    with gzip.open(DATA / "austen.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize("name", CALIBRATION)
def test_calibration_is_ten_distinct_sentences(name: str) -> None:
    lines = read_lines(name)
    assert len(set(lines)) == len(lines) == 10
    assert all(line == line.strip() and line[-1] in ".。" for line in lines)


def test_english_sentences_have_20_to_40_words() -> None:
    lines = read_lines("calibration_en.txt")
    assert all(line.isascii() for line in lines)
    assert [n for line in lines if not 20 <= (n := len(line.split())) <= 40] == []


def test_chinese_sentences_are_chinese() -> None:
    lines = read_lines("calibration_zh.txt")
    assert [line for line in lines if re.search("[A-Za-z]", line)] == []
    assert all(len(re.findall("[\u4e00-\u9fff]", line)) > 0.85 * len(line) > 40 for line in lines)


def test_corpus_holds_the_six_novels(corpus: list[dict[str, str]]) -> None:
    texts = [document["text"] for document in corpus]
    assert len(set(texts)) == len(texts) > 600
    assert sum(map(len, texts)) > 3_900_000
    for novel in NOVELS:
        characters = sum(len(document["text"]) for document in corpus if novel in document["source"])
        assert characters > 400_000, novel
    assert all(document["source"].startswith("Jane Austen, ") for document in corpus)


def test_corpus_starts_with_a_sample_of_all_novels(corpus: list[dict[str, str]]) -> None:
    assert all(any(novel in document["source"] for document in corpus[:40]) for novel in NOVELS)


def test_calibration_is_not_in_the_corpus(corpus: list[dict[str, str]]) -> None:
    whole = " ".join(" ".join(document["text"] for document in corpus).split())
    assert [line for name in CALIBRATION for line in read_lines(name) if line in whole] == []


def test_readme_states_each_size_and_the_corpus_digest() -> None:
    readme = (DATA / "README.md").read_text(encoding="utf-8")
    for name in ["austen.jsonl.gz", *CALIBRATION]:
        row = next(line for line in readme.splitlines() if line.startswith(f"| `{name}`"))
        assert f"{(DATA / name).stat().st_size:,} bytes" in row
    assert hashlib.sha256((DATA / "austen.jsonl.gz").read_bytes()).hexdigest() in readme
