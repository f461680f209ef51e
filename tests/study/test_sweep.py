"""The learning rate of an arm, by short runs on documents that are neither reported nor trained on."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from laco_train.errors import TrainingStopped
from laco_train.settings import DataSettings
from laco_train.study.journal import STUDY_FILE
from laco_train.study.sweep import best_rate
from laco_train.training.data import PackedText
from tests.cli.runs import TRAIN, Project
from tests.study.studies import Outcome, fit_here, study_of, write_recipe

RATES = [1e-5, 0.02]
SWEEP: dict[str, Any] = {
    "study": {
        "arms": {"original": {"model": {"optimizer": {"learning_rate": 0.005}}}, "laco": {}, "scratch": None},
        "seeds": [0],
        "learning_rates": RATES,
        "sweep_share": 0.5,
        "sweep_fraction": 0.3,
    },
    "export": {"enabled": False},
}


@pytest.fixture(scope="module")
def swept(shared_project: Project) -> Outcome:
    """A study that chooses between two rates for two of its arms."""
    write_recipe(shared_project, SWEEP)
    return study_of(shared_project, "--arms", "original,laco")


def rates(outcome: Outcome) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((outcome.study.folder / STUDY_FILE).read_text())["learning_rates"]
    return values


def sweep_summary(outcome: Outcome, name: str) -> dict[str, Any]:
    folder = outcome.study.logs / "s-sweep" / name / "version_0"
    values: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return values


def test_better_rate_on_the_other_split_is_chosen(swept: Outcome) -> None:
    losses = {rate: sweep_summary(swept, f"laco-{rate:g}")["validation"][-1]["loss"] for rate in RATES}
    assert losses[0.02] < losses[1e-5] - 0.01
    tried = [{"learning_rate": rate, "loss": losses[rate]} for rate in RATES]
    assert rates(swept) == {
        "original": {"chosen": 0.005, "how": "arm"},
        "laco": {"chosen": 0.02, "how": "sweep", "tried": tried},
    }
    assert "laco: learning rate 0.02 of 1e-05, 0.02" in swept.lines


def test_each_rate_gets_its_share_and_leaves_no_weights(swept: Outcome) -> None:
    for rate in RATES:
        assert sweep_summary(swept, f"laco-{rate:g}")["tokens"] == 192
    assert not list((swept.study.logs / "s-sweep").rglob("*.ckpt"))
    assert not list((swept.study.logs / "s-sweep").glob("original-*"))


def test_runs_have_the_rate_and_the_reported_validation(swept: Outcome) -> None:
    reported = set()
    for name, rate in (("original-seed0", 0.005), ("laco-seed0", 0.02)):
        summary = json.loads((swept.run(name) / "summary.json").read_text())
        hparams = (swept.run(name) / "config.yaml").read_text()
        assert f"learning_rate: {rate}" in hparams
        reported.add(summary["data"]["validation"]["sha256"])
        trained_on = summary["data"]["train"]["sha256"]
        assert trained_on == sweep_summary(swept, "laco-0.02")["data"]["train"]["sha256"]
    assert len(reported) == 1
    assert sweep_summary(swept, "laco-0.02")["data"]["validation"]["sha256"] not in reported


def test_sweep_is_not_repeated(swept: Outcome, shared_project: Project) -> None:
    def fit(arguments: list[str], log: Path) -> int:
        raise AssertionError(arguments)

    before = rates(swept)
    again = study_of(shared_project, "--arms", "original,laco", fit=fit)
    assert again.lines == ["original-seed0: finished before, skipped", "laco-seed0: finished before, skipped"]
    assert rates(again) == before


def test_rate_that_diverges_is_not_chosen(project: Project) -> None:
    study = {**SWEEP["study"], "learning_rates": [1e30, 0.001]}
    write_recipe(project, {**SWEEP, "study": study})
    outcome = study_of(project, "--arms", "laco")
    assert rates(outcome)["laco"]["chosen"] == 0.001
    assert rates(outcome)["laco"]["tried"][0] == {"learning_rate": 1e30, "loss": None}


def test_no_rate_that_ends_is_a_failed_arm(project: Project) -> None:
    write_recipe(project, SWEEP)
    with pytest.raises(TrainingStopped, match="laco-seed0"):
        study_of(
            project, "--arms", "laco", fit=lambda arguments, log: fit_here([*arguments, "--data.train=no.txt"], log)
        )
    (run,) = [
        run for run in json.loads((project.root / "lightning_logs/s" / STUDY_FILE).read_text())["runs"]
        if run["arm"] == "laco"
    ]  # fmt: skip
    assert run["problem"] == "no rate of study.learning_rates got to the end of its sweep"


@pytest.mark.parametrize(
    ("losses", "best"), [({1.0: 3.0, 2.0: 2.0}, 2.0), ({1.0: None, 2.0: 9.0}, 2.0), ({1.0: None}, None)]
)
def test_best_rate(losses: dict[float, float | None], best: float | None) -> None:
    assert best_rate(losses) == best


def share(text: str) -> float:
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64


@pytest.mark.parametrize("own", [False, True])
def test_three_splits_share_no_document(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, own: bool) -> None:
    texts = [f"{text} End." for text in TRAIN]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "v.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:8]))
    validation = str(tmp_path / "v.jsonl") if own else None

    def documents(validate_on: Any) -> tuple[set[str], set[str]]:
        settings = DataSettings(
            train=str(tmp_path / "t.jsonl"),
            validation=validation,
            validation_fraction=0.2,
            sweep_fraction=0.3,
            validate_on=validate_on,
            block_size=8,
            batch_size=2,
        )
        data = PackedText(settings, lambda: tiny_tokenizer)
        data.setup("fit")
        found = []
        for blocks in (data.train_blocks, data.validation_blocks):
            decoded = tiny_tokenizer.decode([int(i) for block in blocks["input_ids"] for i in block])
            found.append({text for text in texts if text in decoded})
        return found[0], found[1]

    (train, validation_set), (train_again, sweep) = documents("validation"), documents("sweep")
    assert train == train_again
    assert not train & validation_set and not train & sweep and not validation_set & sweep
    assert all(share(text) >= 0.7 for text in sweep) and all(share(text) < 0.7 for text in train)
    assert len(train) > 10 and len(validation_set) > 2 and len(sweep) > 4
