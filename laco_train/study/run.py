"""Runs the arms of a study one after another; what is finished is skipped, what was cut off goes on."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from laco_train.cli.resume import claim
from laco_train.errors import TrainingStopped
from laco_train.study.arms import Recipe, arm_recipe, own_rate
from laco_train.study.journal import Entry, Journal, now
from laco_train.study.locks import alone, holding, is_held, refuse_held
from laco_train.study.place import LOG_FILE, Place
from laco_train.study.process import Fit, fit_process, last_words
from laco_train.study.settings import StudySettings
from laco_train.study.sweep import best_rate, sweep_recipe
from laco_train.study.tasks import Task, tasks


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
        depths: layers that remain at each of study.ratios.
        fit: runs one fit.
        say: called with a line for each thing that happens.
    """

    name: str
    settings: StudySettings
    shared: Recipe
    logs: Path
    depths: Mapping[float, int] = field(default_factory=dict)
    fit: Fit = fit_process
    say: Callable[[str], None] = _say

    @property
    def folder(self) -> Path:
        """Where its runs are."""
        return self.logs / self.name

    def tasks(self, arms: Sequence[str]) -> list[Task]:
        """The runs of `arms`, in order."""
        return tasks(self.settings, arms)

    def place(self, task: Task) -> Place:
        """Where a run is."""
        return Place(self.logs, f"{self.name}/{task.name}")

    def sweep(self, arm: str) -> Iterator[tuple[float, Place, Recipe]]:
        """Rates to try for `arm`, each with its short run: apart, so that TensorBoard shows the arms alone."""
        of_a_seed = [task for task in self.tasks([arm]) if task.seed == self.settings.seeds[0]]
        task = of_a_seed[len(of_a_seed) // 2]  # of the middle ratio
        for rate in self.settings.learning_rates:
            place = Place(self.logs, f"{self.name}-sweep/{arm}-{rate:g}")
            yield rate, place, sweep_recipe(self.recipe(task, rate), self.settings, rate)

    def recipe(self, task: Task, rate: float | None) -> Recipe:
        """The recipe of a run."""
        depth = None if task.ratio is None else self.depths[task.ratio]
        return arm_recipe(self.shared, self.settings, task.arm, task.seed, rate, depth)

    def rate(self, arm: str) -> tuple[float, str] | None:
        """Learning rate of `arm` and how it was chosen, as far as no sweep is needed for it."""
        if (own := own_rate(self.settings, arm)) is not None:
            return own, "arm"
        if not self.settings.sweeps:
            given = self.settings.learning_rates
            return (given[0] if given else self.shared["model"]["optimizer"]["learning_rate"]), "recipe"
        for task in self.tasks([arm]):
            place = self.place(task)
            if place.begun and (recipe := place.recipe) is not None:
                return recipe["model"]["optimizer"]["learning_rate"], "sweep"
        return None


def run_study(study: Study, arms: Sequence[str]) -> None:
    """Run `arms`, each run in `<its name>/version_0` of the study's folder.

    Other processes may run other arms meanwhile.

    Raises:
        InputError: another process works at one of them, or what has begun is not of this recipe. Nothing is written.
        TrainingStopped: a run failed; the others were run all the same, unless study.keep_going is false.
        SystemExit: told to go by a signal.
    """
    refuse_changed(study, arms)
    s, budget = study.settings, study.shared["budget"]
    asked = list(s.arms), s.seeds, s.ratios, budget["max_tokens"], budget["evaluate_at"]
    journal = Journal(study.name, *asked, now())
    study.folder.mkdir(parents=True, exist_ok=True)
    with holding(study.folder, arms):
        for task in study.tasks(journal.arms):
            journal.entry(task)
        with alone(study.folder, "journal"):
            journal.take_over(study.folder, arms)
        for task in study.tasks(arms):
            _note_state(study, task, journal.entry(task))
        failed = _run_all(study, arms, journal, partial(_write, study, arms, journal))
    if failed:
        raise TrainingStopped(f"{len(failed)} of {len(study.tasks(arms))} runs failed: {'; '.join(failed)}")


def refuse_changed(study: Study, arms: Sequence[str]) -> None:
    """InputError if a run is in use, or has begun under another recipe."""
    refuse_held(study.folder, arms)
    for task in study.tasks(arms):
        place, known = study.place(task), study.rate(task.arm)
        if place.run.is_dir():
            claim(place.run, f"study.arms.{task.arm}").close()
        if known is not None:
            place.refuse_other(study.recipe(task, known[0]))
    for arm in arms:
        if study.rate(arm) is None:
            for _, place, recipe in study.sweep(arm):
                place.refuse_other(recipe)


def is_finished(study: Study, task: Task) -> bool:
    """Whether nothing is left to do for `task`."""
    return study.place(task).finished(study.recipe(task, None))


def _write(study: Study, arms: Sequence[str], journal: Journal) -> None:
    """Write study.json: `arms` as this process knows them, others as theirs do, or as their folders say."""
    with alone(study.folder, "journal"):
        others = [arm for arm in journal.arms if arm not in arms]
        journal.take_over(study.folder, others)
        for task in study.tasks([arm for arm in others if not is_held(study.folder, arm)]):
            _note_state(study, task, journal.entry(task))
        journal.write(study.folder)


def _note_state(study: Study, task: Task, entry: Entry) -> None:
    """What the folder says, whatever was noted of a run that was cut off."""
    if is_finished(study, task):
        entry.state = "finished"
    elif entry.state != "failed":
        entry.state = "waiting"


def _run_all(study: Study, arms: Sequence[str], journal: Journal, write: Callable[[], None]) -> list[str]:
    """A line for each run that failed; `write` puts the journal on the disk."""
    failed: list[str] = []
    for task in study.tasks(arms):
        entry = journal.entry(task)
        if entry.state == "finished":
            study.say(f"{task.name}: finished before, skipped")
        elif problem := _run_one(study, task, journal, write):
            study.say(f"{task.name}: failed: {problem}")
            failed.append(task.name)
        write()
        if failed and not study.settings.keep_going:
            return failed
    return failed


def _run_one(study: Study, task: Task, journal: Journal, write: Callable[[], None]) -> str | None:
    """Run what is left of a run; returns why it failed."""
    entry = journal.entry(task)
    entry.state, entry.began, entry.problem = "running", entry.began or now(), None
    write()
    if (rate := _chosen(study, entry.arm, journal)) is None:
        entry.problem = "no rate of study.learning_rates got to the end of its sweep"
    else:
        entry.learning_rate = rate
        write()
        entry.problem = _fit(study, study.place(task), study.recipe(task, rate))
    entry.state, entry.ended = "failed" if entry.problem else "finished", now()
    return entry.problem


def _fit(study: Study, place: Place, recipe: Recipe) -> str | None:
    """Run, or go on with, the fit of `recipe` at `place`; returns why it failed."""
    place.refuse_other(recipe)
    if place.run.is_dir() and not place.begun:
        shutil.rmtree(place.run)  # killed before anything worth keeping: fit would take the next number
    path, log = place.write(recipe), place.folder / LOG_FILE
    begin = log.stat().st_size if log.exists() else 0
    study.say(f"{place.name}: {'goes on' if place.begun else 'begins'}; its output is in {log}")
    code = study.fit(["--recipe", str(path), "--resume", "auto", "--name", place.name], log)
    if code == 0 and place.finished(recipe):
        study.say(f"{place.name}: {_outcome(place)}")
        return None
    return f"{last_words(log, begin)} (exit code {code})"


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
    for rate, place, recipe in study.sweep(arm):
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
