"""`study --recipe R`: arms on the same data, evaluation points and budget, one after another."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, reduce
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse import SUPPRESS

from laco_train.checks import (
    check_budget,
    check_collapse,
    check_data,
    check_evaluation,
    check_export,
    check_limits,
    check_model,
)
from laco_train.cli.parsing import VerbParser, add_recipe_flag, resolve_arguments
from laco_train.cli.recipe_text import sections
from laco_train.cli.values import check_values
from laco_train.errors import InputError
from laco_train.settings import SECTIONS, DataSettings
from laco_train.study.settings import StudySettings, check_study, known

if TYPE_CHECKING:
    from laco_train.study.run import Study

_OF_AN_ARM = re.compile(r"--study\.arms\.(?P<arm>[^.=]+)\.(?P<key>[^=]+)(=(?P<value>.*))?", re.DOTALL)


def parser() -> VerbParser:
    """The verb's parser."""
    description = "Train arms of a study one after another, and compare them; the same command goes on with it."
    p = VerbParser(prog="laco_train study", description=description, print_config="--print_config")
    add_recipe_flag(p)
    p.add_argument("--arms", type=str | None, help="Only these arms of the recipe, such as laco,sleb; null: all.")
    where = "Where its runs go under lightning_logs, and its name; null: the recipe's name."
    p.add_argument("--name", type=str | None, help=where)
    p.add_class_arguments(StudySettings, "study")
    for name, settings in SECTIONS.items():
        p.add_class_arguments(settings, name)
    p.add_argument("--trainer", type=dict[str, Any], default={}, help="Any option of Lightning's Trainer.")
    p.add_argument("--seed_everything", type=bool | int, default=0, help=SUPPRESS)  # study.seeds takes its place
    return p


def run(args: list[str]) -> None:
    """Check everything, then run what is not finished yet."""
    arguments, recipe = resolve_arguments(args)
    _refuse_fits(arguments)
    config = parser().parse_args(with_arms(arguments))
    study, arms = checked(config, recipe or "study", parser())

    from laco_train.errors import TrainingStopped
    from laco_train.study.outcome import print_outcome
    from laco_train.study.run import run_study

    try:
        run_study(study, arms)
    except TrainingStopped:
        print_outcome(study)
        raise
    print_outcome(study)


def _refuse_fits(arguments: list[str]) -> None:
    """Refuse recipes of fit, which name no arms; one may be printed, to write a study of it."""
    if any(argument.startswith(("--study", "--print_config", "--help", "-h")) for argument in arguments):
        return
    recipes = [Path(value) for flag, value in pairwise(arguments) if flag == "--recipe"]
    if recipes and not any("study" in sections(path) for path in recipes):
        problem = "has no section study, so it is one of fit; run it with fit, or add `study: {}` to it for all arms"
        raise InputError("--recipe", f"{recipes[-1]} {problem}")


def with_arms(arguments: list[str]) -> list[str]:
    """`arguments`, options such as --study.arms.laco.collapse.merge_rule=mean put over the recipe's arms.

    The parser would take each of them for all that is to be said of its arm.

    Raises:
        InputError: one has no value, or what is beside them can't be parsed.
    """
    others: list[str] = []
    changes: list[dict[str, Any]] = []
    rest = iter(arguments)
    for argument in rest:
        if (found := _OF_AN_ARM.fullmatch(argument)) is None:
            others.append(argument)
            continue
        text = next(rest, None) if found["value"] is None else found["value"]
        if text is None:
            raise InputError(argument, "names no value; give one")
        value = _value(text)
        for name in reversed([found["arm"], *found["key"].split(".")]):
            value = {name: value}
        changes.append(value)
    if not changes:
        return arguments

    from laco_train.study.arms import merged

    arms = parser().parse_args([one for one in others if not one.startswith("--print_config")]).study.arms
    return [*others, f"--study.arms={yaml.safe_dump(reduce(merged, changes, arms), sort_keys=False)}"]


def _value(text: str) -> Any:
    """As the parser reads a value of any type."""
    p = VerbParser()
    p.add_argument("--value", type=Any)
    return p.parse_args([f"--value={text}"]).value


def checked(config: Any, name: str, p: VerbParser) -> "tuple[Study, list[str]]":
    """The study that `config` asks for, and the arms to run; nothing is written.

    Raises:
        InputError: the first thing in it that could not work.
    """
    ready = p.instantiate(config)
    settings: StudySettings = ready.study
    shared: dict[str, Any] = yaml.safe_load(p.dump(config, skip_unset=False))
    for key in ("study", "arms", "name", "recipe"):
        shared.pop(key, None)
    typed(shared)
    trainer = shared["trainer"]
    if trainer.get("logger") not in (None, True):
        raise InputError("trainer.logger", "goes not with a study, which goes on in fit's own curves; drop it")
    check_study(settings, ready.collapse, ready.budget, tokens_a_step(ready.data, trainer))
    arms = chosen(config.arms, settings)

    from laco_train.cli.loggers import logs_in
    from laco_train.study.arms import merged
    from laco_train.study.depths import depths_at
    from laco_train.study.run import Study, refuse_changed

    for arm, changes in settings.arms.items():
        with naming(arm):
            typed(merged(shared, changes or {}))
    check_model(ready.model)
    depths = depths_at(settings.ratios, ready.model) if settings.ratios else {}
    study = Study(config.name or name, settings, shared, logs_in(trainer), depths)
    check_recipe(study.recipe(study.tasks(arms)[0], None))  # what is wrong in all arms is no arm's fault

    from laco_train.evaluation.in_run import prompts_of, questions_of

    questions_of(ready.evaluation)
    prompts_of(ready.evaluation)
    sections = {arm: check_arm(study, arm) for arm in settings.arms}
    refuse_changed(study, arms)
    _say_disk(study, arms, sections)
    return study, arms


def chosen(names: str | None, settings: StudySettings) -> list[str]:
    """Arms that --arms names, in the recipe's order; all without it."""
    all_arms = tuple(settings.arms)
    if names is None:
        return list(all_arms)
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise InputError("--arms", f"names no arm; the arms of this recipe are {', '.join(all_arms)}")
    for name in wanted:
        known(name, all_arms, "--arms")
    return [arm for arm in all_arms if arm in wanted]


def tokens_a_step(data: DataSettings, trainer: dict[str, Any]) -> int:
    """Tokens of an optimizer step, over the devices as far as the recipe counts them."""
    devices, accumulate = trainer.get("devices"), trainer.get("accumulate_grad_batches") or 1
    return data.block_size * data.batch_size * accumulate * (devices if isinstance(devices, int) and devices > 0 else 1)


def check_arm(study: "Study", arm: str) -> Any:
    """The sections of an arm's first run, filled in."""
    with naming(arm):
        return check_recipe(study.recipe(study.tasks([arm])[0], None))


@contextmanager
def naming(arm: str) -> Iterator[None]:
    """An InputError of the block names `arm`."""
    try:
        yield
    except InputError as error:
        raise InputError(f"study.arms.{arm}", str(error)) from None


@cache
def recipe_parser() -> Any:
    """Parser of a recipe of fit."""
    from lightning.pytorch import Trainer

    from laco_train.cli.trainer import RecipeParser

    p = RecipeParser(prog="laco_train study")
    p.add_argument("--seed_everything", type=bool | int, default=0)
    for name, section in SECTIONS.items():
        p.add_class_arguments(section, name)
    p.add_lightning_class_args(Trainer, "trainer")
    return p


def typed(recipe: dict[str, Any]) -> Any:
    """`recipe` as the parser of fit gives it; an InputError names a key whose value is of another type."""
    parsed = recipe_parser().parse_object(recipe)
    check_values(parsed)
    return parsed


def check_recipe(recipe: dict[str, Any]) -> Any:
    """Refuse what fit would refuse of `recipe`, as far as that can be told without the weights.

    Returns:
        Its sections by name, as dataclasses.
    """
    from laco_train.collapse.families import depth_of
    from laco_train.models import load_config

    ready = recipe_parser().instantiate(typed(recipe))
    check_model(ready.model)
    config = load_config(ready.model.source, trust_remote_code=ready.model.trust_remote_code)
    check_collapse(ready.collapse, depth_of(config))
    check_data(ready.data)
    check_budget(ready.budget)
    check_evaluation(ready.evaluation)
    check_export(ready.export)
    check_limits(recipe["trainer"])
    return ready


def _say_disk(study: "Study", arms: Sequence[str], sections: dict[str, Any]) -> None:
    from laco_train.study.disk import check_room, needed, run_size
    from laco_train.study.run import is_finished

    tasks = study.tasks(arms)
    left = [task for task in tasks if not is_finished(study, task)]
    precision = str(study.shared["trainer"].get("precision") or "32-true")
    sizes = {}
    for arm in dict.fromkeys(task.arm for task in left):  # at its smallest ratio, so none of its runs takes more
        ready = sections[arm]
        kept = 0 if ready.trainer.enable_checkpointing is False else 2  # the best and the newest
        with naming(arm):
            sizes[arm] = run_size(ready.model, ready.collapse, ready.export, precision, kept=kept)
    said = check_room(needed([(sizes[task.arm], study.place(task).run) for task in left]), study.logs)
    print(f"Study {study.name}: {len(left)} of {len(tasks)} runs are left; {said}", flush=True)
