"""A base model's licence is found where it says one, and what some ask is told."""

import dataclasses
from pathlib import Path

import pytest

from laco_train.export import CardFacts, model_card
from laco_train.export.licence import Licence, licence_of


def folder(path: Path, card: str) -> str:
    path.mkdir(exist_ok=True)
    (path / "README.md").write_text(card, encoding="utf-8")
    return str(path)


def test_from_the_card_of_a_folder(tmp_path: Path) -> None:
    assert licence_of(folder(tmp_path, "---\nlicense: mit\n---\nText\n")) == Licence("mit")
    named = "---\nlicense: other\nlicense_name: qwen\nlicense_link: LICENSE\n---\n"
    assert licence_of(folder(tmp_path, named)) == Licence("other", "qwen", "LICENSE")
    assert licence_of(folder(tmp_path, named)).metadata == {  # type: ignore[union-attr]
        "license": "other",
        "license_name": "qwen",
        "license_link": "LICENSE",
    }


def test_from_a_gguf_file_that_a_package_ships(smollm2: str) -> None:
    assert licence_of(smollm2) == Licence("apache-2.0")


@pytest.mark.parametrize(
    "card", ["no metadata\n", "---\ntags: [a]\n---\n", "---\nlicense: [mit]\n---\n", "---\n{\n---\n"]
)
def test_a_card_without_one(tmp_path: Path, card: str) -> None:
    assert licence_of(folder(tmp_path, card)) is None


def test_what_is_not_there_or_not_readable(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 40)
    (tmp_path / "short.gguf").write_bytes(b"GGUF")
    for source in ("no-such/model", "../nowhere", "package:nothing/x.gguf", str(tmp_path)):
        assert licence_of(source) is None
    for name in ("broken", "short"):
        assert licence_of(str(tmp_path / f"{name}.gguf")) is None


@pytest.mark.parametrize(
    ("licence", "words"),
    [
        (Licence("llama2"), "a file Notice"),
        (Licence("llama3"), '"Built with Meta Llama 3"'),
        (Licence("llama3.1"), '"Built with Llama"'),
        (Licence("gemma"), "use restrictions"),
        (Licence("other", "qwen"), '"Built with Qwen"'),
    ],
)
def test_what_a_licence_asks_stands_in_the_card(facts: CardFacts, licence: Licence, words: str) -> None:
    card = model_card(dataclasses.replace(facts, licence=licence), None)
    assert words in card
    assert f"({licence.name or licence.id}) holds for this model too" in card


def test_a_free_licence_asks_for_nothing(facts: CardFacts) -> None:
    assert Licence("apache-2.0").reminder is None
    assert "asks you" not in model_card(facts, None)


def test_an_unknown_licence_is_said_to_be_unknown(facts: CardFacts) -> None:
    assert "its files did not tell which" in model_card(dataclasses.replace(facts, licence=None), None)
