"""Runs the arms of a study one after another; what is finished is skipped, what was cut off goes on."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from laco_train.cli.resume import claim
from laco_train.errors import TrainingStopped
from laco_train.study.arms import Recipe, arm_recipe, own_rate
from laco_train.study.journal import Entry, Journal, now
from laco_train.study.place import LOG_FILE, Place
from laco_train.study.process import Fit, fit_process, last_words
from laco_train.study.settings import StudySettings
from laco_train.study.sweep import best_rate, sweep_recipe


def _say(line: str) -> None:
    print(line, flush=True)


@dataclass(frozen=True)
class Study:
    """A study that was checked.

    Attributes:
        name: that of its recipe.
        settings: the recipe's section `study`.
        shared: its other sections, all keys filled in.
        logs: Lightning's folder, lightning_logs.
        fit: runs one fit.
        say: called with a line for each thing that happens.
    """

    name: str
    settings: StudySettings
    shared: Recipe
    logs: Path
    fit: Fit = fit_process
    say: Callable[[str], None] = _say

    @property
    def folder(self) -> Path:
        """Where its runs are."""
        return self.logs / self.name

    def place(self, arm: str, seed: int) -> Place:
        """Where a run is."""
        return Place(self.logs, f"{self.name}/{arm}-seed{seed}")

    def sweep_place(self, arm: str, rate: float) -> Place:
        """Where a short run of a sweep is: apart, so that TensorBoard shows the arms alone."""
        return Place(self.logs, f"{self.name}-sweep/{arm}-{rate:g}")

    def recipe(self, arm: str, seed: int, rate: float | None) -> Recipe:
        """The recipe of a run."""
        return arm_recipe(self.shared, self.settings, arm, seed, rate)

    def rate(self, arm: str) -> tuple[float, str] | None:
        """Learning rate of `arm` and how it was chosen, as far as no sweep is needed for it."""
        if (own := own_rate(self.settings, arm)) is not None:
            return own, "arm"
        if not self.settings.sweeps:
            given = self.settings.learning_rates
            return (given[0] if given else self.shared["model"]["optimizer"]["learning_rate"]), "recipe"
        for seed in self.settings.seeds:
            place = self.place(arm, seed)
            if place.begun and (recipe := place.recipe) is not None:
                return recipe["model"]["optimizer"]["learning_rate"], "sweep"
        return None


def run_study(study: Study, arms: Sequence[str]) -> None:
    """Run `arms` with every seed, each in `<arm>-seed<k>/version_0` of the study's folder.

    Raises:
        InputError: another process works on it, or what has begun there is not of this recipe. Nothing is written then.
        TrainingStopped: a run failed; the others were run all the same, unless study.keep_going is false.
        SystemExit: told to go by a signal.
    """
    refuse_changed(study, arms)
    s = study.settings
    journal = Journal(
        study.name,
        list(s.arms),
        s.seeds,
        study.shared["budget"]["max_tokens"],
        study.shared["budget"]["evaluate_at"],
        now(),
    )
    journal.take_over(study.folder)
    study.folder.mkdir(parents=True, exist_ok=True)
    with claim(study.folder, "study"):
        for arm in s.arms:
            for seed in s.seeds:
                _note_state(study, journal.entry(arm, seed))
        failed = _run_all(study, arms, journal)
    if failed:
        raise TrainingStopped(f"{len(failed)} of {len(arms) * len(s.seeds)} runs failed: {'; '.join(failed)}")


def refuse_changed(study: Study, arms: Sequence[str]) -> None:
    """InputError if a run is in use, or has begun under another recipe."""
    if study.folder.is_dir():
        claim(study.folder, "study").close()
    for seed in study.settings.seeds:
        for arm in arms:
            place, known = study.place(arm, seed), study.rate(arm)
            if place.run.is_dir():
                claim(place.run, f"study.arms.{arm}").close()
            if known is not None:
                place.refuse_other(study.recipe(arm, seed, known[0]))


def unfinished(study: Study, arms: Sequence[str]) -> list[tuple[str, int]]:
    """(arm, seed) of what is left to do."""
    pairs = [(arm, seed) for seed in study.settings.seeds for arm in arms]
    return [(arm, seed) for arm, seed in pairs if not study.place(arm, seed).finished(study.recipe(arm, seed, None))]


def _note_state(study: Study, entry: Entry) -> None:
    """What the folder says, whatever was noted of a run that was cut off."""
    place = study.place(entry.arm, entry.seed)
    if place.finished(study.recipe(entry.arm, entry.seed, None)):
        entry.state = "finished"
    elif entry.state != "failed":
        entry.state = "waiting"


def _run_all(study: Study, arms: Sequence[str], journal: Journal) -> list[str]:
    """A line for each run that failed."""
    failed: list[str] = []
    for seed in study.settings.seeds:
        for arm in arms:
            entry = journal.entry(arm, seed)
            if entry.state == "finished":
                study.say(f"{arm}-seed{seed}: finished before, skipped")
            elif problem := _run_one(study, entry, journal):
                study.say(f"{arm}-seed{seed}: failed: {problem}")
                failed.append(f"{arm}-seed{seed}")
            journal.write(study.folder)
            if failed and not study.settings.keep_going:
                return failed
    return failed


def _run_one(study: Study, entry: Entry, journal: Journal) -> str | None:
    """Run what is left of a run; returns why it failed."""
    entry.state, entry.began, entry.problem = "running", entry.began or now(), None
    journal.write(study.folder)
    if (rate := _chosen(study, entry.arm, journal)) is None:
        entry.problem = "no rate of study.learning_rates got to the end of its sweep"
    else:
        entry.learning_rate = rate
        journal.write(study.folder)
        place = study.place(entry.arm, entry.seed)
        entry.problem = _fit(study, place, study.recipe(entry.arm, entry.seed, rate))
    entry.state, entry.ended = "failed" if entry.problem else "finished", now()
    return entry.problem


def _fit(study: Study, place: Place, recipe: Recipe) -> str | None:
    """Run, or go on with, the fit of `recipe` at `place`; returns why it failed."""
    place.refuse_other(recipe)
    if place.run.is_dir() and not place.begun:
        shutil.rmtree(place.run)  # killed before anything worth keeping: fit would take the next number
    path, log = place.write(recipe), place.folder / LOG_FILE
    study.say(f"{place.name}: {'goes on' if place.begun else 'begins'}; its output is in {log}")
    code = study.fit(["--recipe", str(path), "--resume", "auto", "--name", place.name], log)
    if code == 0 and place.finished(recipe):
        study.say(f"{place.name}: {_outcome(place)}")
        return None
    return f"{last_words(log)} (exit code {code})"


def _outcome(place: Place) -> str:
    summary = place.summary
    first, last = summary["validation"][0]["loss"], summary["validation"][-1]
    return f"loss {first:.4f} -> {last['loss']:.4f} after {last['tokens']:,} tokens, {summary['depth']} layers"


def _chosen(study: Study, arm: str, journal: Journal) -> float | None:
    """The learning rate of `arm`, by a sweep if need be; None if that gave none."""
    if (known := study.rate(arm)) is not None:
        rate, how = known
        noted = journal.learning_rates.get(arm, {})
        if noted.get("chosen") != rate:  # else the sweep is noted too
            journal.learning_rates[arm] = {"chosen": rate, "how": how}
        return rate
    losses: dict[float, float | None] = {}
    for rate in study.settings.learning_rates:
        place = study.sweep_place(arm, rate)
        recipe = sweep_recipe(study.recipe(arm, study.settings.seeds[0], rate), study.settings, rate)
        if not place.finished(recipe) and (problem := _fit(study, place, recipe)):
            study.say(f"{place.name}: failed: {problem}")
            losses[rate] = None
            continue
        place.refuse_other(recipe)
        losses[rate] = place.summary["validation"][-1]["loss"]
        shutil.rmtree(place.run / "checkpoints", ignore_errors=True)  # only its loss was wanted
    best = best_rate(losses)
    if best is not None:
        tried = [{"learning_rate": rate, "loss": loss} for rate, loss in losses.items()]
        journal.learning_rates[arm] = {"chosen": best, "how": "sweep", "tried": tried}
        study.say(f"{arm}: learning rate {best:g} of {', '.join(f'{rate:g}' for rate in losses)}")
    return best
