"""`fit` with rounds: each collapses what the one before trained, and trains again, in a subfolder of the run.

A round is an ordinary fit whose model.source is the export of the round before; the folders say how far a run is.
"""

import dataclasses
import gc
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_only

from laco_train.checks import check_rounds, check_static, least_depth, out_of_reach
from laco_train.cli.loggers import logger_in, logs_in
from laco_train.cli.record import make_numbered
from laco_train.cli.resume import (
    CONFIG_FILE,
    SUMMARY_FILE,
    EarlierRun,
    RunIsFinished,
    check_options,
    claim,
    earlier_run,
    is_finished,
    newest_good,
    refuse_other_recipe,
)
from laco_train.cli.rounds_record import folder_name, joined_summary, losses_so_far, round_records, sentence
from laco_train.cli.trainer import RecipeCLI
from laco_train.cli.trainer import run as run_verb
from laco_train.collapse import CollapsePlan
from laco_train.collapse.composition import compose, from_the_first_model
from laco_train.collapse.families import depth_of
from laco_train.export import CardFacts
from laco_train.export.proof import PLAN_FILE
from laco_train.files import write_whole
from laco_train.models import load_config
from laco_train.settings import CollapseSettings, ExportSettings, ModelSettings, RoundSettings
from laco_train.study.disk import check_room, needed, run_size
from laco_train.training.distill import distills

ROUNDS_FILE = "rounds.json"
"""In the folder of a run of rounds: depth, tokens and losses of each round that is finished."""
KEEP_ALL = {
    "collapse.strategy": "none",
    "collapse.target_depth": "null",
    "collapse.criterion": "similarity",
    "collapse.refine.tokens": 0,
}
"""Options of a round that collapses nothing: its strategy, and what would contradict that."""
_LOOK_SECONDS = 0.2


@dataclass
class Rounds:
    """A run of rounds.

    Attributes:
        rounds: of the recipe.
        folder: of the run; other ranks than 0 know it once the first round has begun.
        recipe: content of its config.yaml.
        exports: whether the last round exports.
        keeps: whether exports of earlier rounds stay.
        claimed: holds the folder.
        processes: that Lightning started, once for all rounds.
    """

    rounds: list[RoundSettings]
    folder: Path
    recipe: str
    exports: bool
    keeps: bool
    claimed: TextIO | None = None
    processes: list[Any] = field(default_factory=list)

    def folder_of(self, index: int) -> Path:
        """Run folder of a round, from 0."""
        return self.folder / folder_name(index)

    def export_of(self, index: int) -> Path:
        """Where a round exports to: the last where any run does."""
        return (self.folder if index == len(self.rounds) - 1 else self.folder_of(index)) / "export"

    def is_done(self, index: int) -> bool:
        """Whether a round is at its end."""
        exports = self.exports or index < len(self.rounds) - 1
        return (self.folder_of(index) / SUMMARY_FILE).is_file() and (not exports or self.export_of(index).is_dir())

    def next(self) -> int:
        """The round to go on with: the one after the last that is done, as exports before it may be gone."""
        return 1 + max((index for index in range(len(self.rounds)) if self.is_done(index)), default=-1)

    def summaries(self, count: int) -> list[dict[str, Any]]:
        """summary.json of the first `count` rounds."""
        texts = [(self.folder_of(index) / SUMMARY_FILE).read_text(encoding="utf-8") for index in range(count)]
        return [json.loads(text) for text in texts]

    def hold(self) -> None:
        """Keep other processes off the folder."""
        if self.claimed is None:
            self.claimed = claim(self.folder)


class BeginRounds(Callback):
    """Leaves the whole recipe in the folder of a run of rounds once it is sure to begin."""

    def __init__(self, run: Rounds):
        self.run = run

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The folder is rank 0's choice."""
        self.run.folder = Path(str(trainer.log_dir)).parent
        if trainer.is_global_zero:
            self.run.folder.mkdir(parents=True, exist_ok=True)
            self.run.hold()
            if not (self.run.folder / CONFIG_FILE).exists():
                write_whole(self.run.folder / CONFIG_FILE, self.run.recipe)


class RoundCLI(RecipeCLI):
    """The fit of one round, from 0, in its own folder; it goes on if it has begun."""

    _depth_of_folder = 4  # lightning_logs/<recipe>/version_N/round_K

    def __init__(self, args: list[str], recipe: str | None, run: Rounds, index: int):
        self.run, self.index = run, index
        super().__init__(args, recipe)

    def _earlier_run(self) -> EarlierRun | None:
        folder = self.run.folder_of(self.index)
        if not folder.is_dir():
            return None
        say = rank_zero_only(partial(print, flush=True))
        return self._go_on(EarlierRun(folder, newest_good(folder / "checkpoints", say)))

    def _logger(self, logs: Path) -> TensorBoardLogger:
        return logger_in(self.run.folder_of(self.index))

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        return super()._instantiate_trainer(config, [BeginRounds(self.run), *callbacks])

    def _run_subcommand(self, subcommand: str) -> None:
        launcher = self.trainer.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher):
            launcher.procs += self.run.processes  # of an earlier round; they end with this process
        super()._run_subcommand(subcommand)
        if isinstance(launcher, _SubprocessScriptLauncher):
            self.run.processes = launcher.procs

    def _export_to(self) -> Path:
        return self.run.export_of(self.index)

    def _card(self, plan: CollapsePlan) -> CardFacts:
        card = super()._card(plan)
        before = round_records(self.run.summaries(self.index))
        now = {name: value for name, value in card.losses.items() if name != "original" or not before}
        if before:
            now = {**losses_so_far(before), **{f"round {self.index + 1}, {name}": loss for name, loss in now.items()}}
        tokens, steps = (sum(record[name] for record in before) for name in ("tokens", "steps"))
        refined = sum(one.get("refined_tokens", 0) for one in self.run.summaries(self.index))
        train = {**card.data["train"], "refined_tokens": refined + self.model.refined_tokens}
        tokens, steps = card.tokens + tokens - refined, card.steps + steps
        return dataclasses.replace(card, losses=now, tokens=tokens, steps=steps, data={**card.data, "train": train})


class FitCLI(RecipeCLI):
    """`fit`: one run, or all rounds of a recipe that has some."""

    run: Rounds | None = None

    def __init__(self, args: list[str], recipe: str | None):
        self.arguments = args
        super().__init__(args, recipe)

    def instantiate_classes(self) -> None:
        """Without rounds as any fit; else check them while nothing is written, and take hold of a run that goes on."""
        if self.config["fit"].rounds is None:
            super().instantiate_classes()
            return
        self.config_init = self.parser.instantiate(self.config)
        given, trainer = self.config_init["fit"], self._get(self.config_init, "trainer")
        self.recipe = given.name or self.recipe
        own_logger = trainer.get("logger") not in (None, True) or bool(trainer.get("fast_dev_run"))
        check_static("trainer.logger", not own_logger, "rounds need fit's own logger and folder; drop it, or rounds")
        check_static("--ckpt_path", given.ckpt_path is None, "goes not with rounds; use --resume auto")
        check_options(given.resume, given.run, None, own_logger=False)
        self.source: ModelSettings = given.model
        check_static("model.from_scratch", not self.source.from_scratch, "goes not with rounds, which go on; drop one")
        check_rounds(given.rounds, given.collapse)
        depth = depth_of(load_config(self.source.source, trust_remote_code=self.source.trust_remote_code))
        check_rounds(given.rounds, given.collapse, depth)
        check_reach(given.rounds, given.collapse, depth)
        self.run = self._run_to_go_on_with(logs_in(trainer))

    def _run_to_go_on_with(self, logs: Path) -> Rounds:
        given, text = self.config_init["fit"], self._parser("fit").dump(self.config["fit"], skip_unset=False)
        say = rank_zero_only(partial(print, flush=True))
        earlier = None if given.resume is None else earlier_run(logs / self.recipe, given.run, say)
        folder = Path(TensorBoardLogger(logs, name=self.recipe).log_dir) if earlier is None else earlier.folder
        run = Rounds(given.rounds, folder, text, given.export.enabled, given.export.keep_rounds)
        if earlier is not None:
            refuse_other_recipe(earlier, text)
            if is_finished(folder, run.exports):
                raise RunIsFinished(f"{folder} is finished: there is nothing to resume.")
            if not getattr(rank_zero_only, "rank", 0):
                run.hold()
                earlier.tidy()  # the last export is written here, not in its round's folder
        elif given.resume is not None:
            say(f"No run has begun in {logs / self.recipe} yet: this one is the first.")
        return run

    def _run_subcommand(self, subcommand: str) -> None:
        if self.run is None:
            super()._run_subcommand(subcommand)
            return
        run, first = self.run, not getattr(rank_zero_only, "rank", 0)
        if first:
            print(f"Disk: {check_room(self._disk_needed(run), run.folder)}", flush=True)
            if run.claimed is None:  # it begins
                run.folder = make_numbered(TensorBoardLogger(run.folder.parents[1], name=self.recipe))
        for index in range(run.next(), len(run.rounds)):
            if first:
                if index > 0:
                    self._record(index)  # here, as a run may have been killed before it had
                print(f"Round {index + 1} of {len(run.rounds)}: {run.folder_of(index)}", flush=True)
                if self._is_shallow_enough(index):
                    asked = run.rounds[index].target_depth
                    print(f"The round before left {asked} layers or fewer already: this one trains on", flush=True)
            done = RoundCLI([*self.arguments, *self._changes(index)], self.recipe, run, index)
            if done.trainer.interrupted:
                return
            del done
            free_memory()
            if not first:
                wait_for(run, index)
        if first:
            self._finish()

    def _disk_needed(self, run: Rounds) -> int:
        """Bytes that the rounds left need at most, beside what is there."""
        given, trainer = self.config_init["fit"], self._get(self.config_init, "trainer")
        precision = str(trainer.get("precision") or "32-true")
        kept = 0 if trainer.get("enable_checkpointing") is False else len(self._checkpoints(trainer)) or 2
        sizes = []
        for index in range(run.next(), len(run.rounds)):
            collapse = dataclasses.replace(given.collapse, target_depth=run.rounds[index].target_depth)
            export = given.export if index == len(run.rounds) - 1 else ExportSettings()
            sizes.append((run_size(given.model, collapse, export, precision, kept=kept), run.folder_of(index)))
        return needed(sizes, exports_stay=run.keeps)

    def _changes(self, index: int) -> list[str]:
        """Options that make a round of the recipe."""
        assert self.run is not None
        given, one = self.config_init["fit"], self.run.rounds[index]
        changes: dict[str, Any] = {"rounds": "null", "resume": "null", "run": "null", "name": self.recipe}
        if self._is_shallow_enough(index):
            changes |= KEEP_ALL
        else:
            changes["collapse.target_depth"] = one.target_depth
        changes["data.seed"] = given.data.seed + index  # else it would read the same blocks in the same order
        if one.max_tokens is not None:
            changes["budget.max_tokens"] = one.max_tokens
        if one.learning_rate is not None:
            changes["model.optimizer.learning_rate"] = one.learning_rate
        if index > 0:
            changes["model.source"] = self.run.export_of(index - 1)
            if distills(self.source.distill) and self.source.distill.teacher is None:
                changes["model.distill.teacher"] = self.source.source
        if index < len(self.run.rounds) - 1:
            changes |= {"export.enabled": "true", "export.dtype": "auto"}  # what was trained, not rounded
        return [f"--{key}={value}" for key, value in changes.items()]

    def _is_shallow_enough(self, index: int) -> bool:
        """Whether the round before merged past its own depth to that of this one, which then collapses nothing."""
        assert self.run is not None
        return index > 0 and self.run.summaries(index)[-1]["depth"] <= self.run.rounds[index].target_depth

    def _record(self, count: int) -> None:
        """After `count` rounds, again where a run goes on; what they no longer need goes if the recipe says so."""
        assert self.run is not None
        run = self.run
        records = {"source": self.source.source, "rounds": round_records(run.summaries(count))}
        write_whole(run.folder / ROUNDS_FILE, json.dumps(records, indent=1) + "\n")
        if not run.keeps and run.export_of(count - 1).is_dir():
            for index in range(count - 1):
                shutil.rmtree(run.export_of(index), ignore_errors=True)

    def _finish(self) -> None:
        assert self.run is not None
        run, count = self.run, len(self.run.rounds)
        summaries = run.summaries(count)
        plans = [CollapsePlan.load(run.folder_of(index) / PLAN_FILE) for index in range(count)]
        plan = from_the_first_model(plans[0], self.source.source)
        for earlier, later in zip(summaries, plans[1:], strict=False):
            plan = compose(plan, later, earlier["tokens"])
        plan.save(run.folder / PLAN_FILE, weights=False)
        self._record(count)
        write_whole(run.folder / SUMMARY_FILE, json.dumps(joined_summary(summaries, plan), indent=1) + "\n")
        for record in round_records(summaries):
            print(sentence(record), flush=True)
        print(f"Run: {run.folder}   curves: tensorboard --logdir {run.folder}", flush=True)


def wait_for(run: Rounds, index: int) -> None:
    """Until rank 0 has exported a round; should it fail, it or its launcher ends this process."""
    while not run.is_done(index):
        time.sleep(_LOOK_SECONDS)


def free_memory() -> None:
    """Leave the next round a device like that of a fresh process."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def check_reach(rounds: Sequence[RoundSettings], s: CollapseSettings, depth: int) -> None:
    """Refuse a round to a depth that its search can't reach, before those that come first are trained.

    Args:
        depth: of the model.
    """
    before = range(depth, depth + 1)
    for number, one in enumerate(rounds):
        least, target = min(least_depth(s, layers) for layers in before), one.target_depth
        check_static(f"rounds[{number}].target_depth", target >= least, f"is {target}, {out_of_reach(s, least)}")
        before = range(target if s.exact else least, target + 1)  # a merge of several layers may overshoot


def run(args: list[str]) -> None:
    """Fit with command-line arguments `args`."""
    run_verb("fit", args, FitCLI)
