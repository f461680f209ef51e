"""What the parsers of all verbs share: one-line errors, and recipes found by name. Imports no torch."""

import re
from collections.abc import Mapping
from typing import Any, NoReturn

from jsonargparse import SUPPRESS, ActionConfigFile, ArgumentParser, set_parsing_settings

from laco_train.cli.recipe_text import check_recipe
from laco_train.cli.values import check_values
from laco_train.errors import InputError
from laco_train.recipes import find_recipe
from laco_train.settings import SECTIONS

# --help shows the line under each field of laco_train.settings
set_parsing_settings(docstring_parse_attribute_docstrings=True)
# a class_path in what a verb only passes on, or leaves alone, would be made an object, which runs code
set_parsing_settings(instantiate_subclass_spec_in_any=False)
# its list of what runs commands, such as os and subprocess, is a list of warnings unless it is added to
set_parsing_settings(import_path_denylist=[])

_RECIPE_FLAGS = ("--recipe", "-r", "--config", "-c")
# jsonargparse's messages that name the key in the middle; the rest begin with it
_UNKNOWN = re.compile(
    r"unrecognized arguments: (?P<flag>[^\s=]+)"
    r"|(Group '(?P<group>\S+)'|Subcommand '\S+') does not accept option '(?P<key>\S+)'"
    r"|Option '(?P<option>\S+)' is not accepted"
)
_MISSING = re.compile(r"the following arguments are required: ((fit|validate)\.)?(?P<key>[^\s,]+)")
_NO_RECIPE = re.compile(r"(Problems parsing config|Unexpected config): ?(?P<problem>.*)")


class OneLineErrors:
    """Mixin of argument parsers: an error is an InputError instead of a usage text and an exit."""

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """What argparse gives, its numbers and texts checked.

        Raises:
            InputError: something that can't be parsed, or that nothing could work with.
        """
        try:
            found = super().parse_args(*args, **kwargs)  # type: ignore[misc]
        except InputError:
            raise
        except (ValueError, OverflowError, RecursionError) as error:  # YAML's own, of numbers with too many digits
            raise InputError("command line", f"can't be parsed ({error})") from None
        check_values(found)
        return found

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what argparse would print, shortened to the line that names the key."""
        raise InputError(*_key_and_problem(message))


class VerbParser(OneLineErrors, ArgumentParser):
    """Parser of a verb that needs no Trainer."""


def _key_and_problem(message: str) -> tuple[str, str]:
    lines = [line.strip(" -") for line in message.splitlines() if line.strip()]
    text = " ".join(lines)
    if found := _UNKNOWN.search(text):
        key = ".".join(part for part in found.group("flag", "group", "key", "option") if part)
        return key, "is unknown here; --help lists every key"
    if found := _MISSING.search(text):
        return found["key"] if "." in found["key"] else f"--{found['key']}", "is missing; give it"
    if found := _NO_RECIPE.search(text):
        return "--recipe", f"is no YAML of sections and keys ({found['problem'] or 'it is empty'})"
    key, separator, problem = text.removeprefix("Parser key ").removeprefix("argument ").partition(":")
    return (key.strip("'\" "), problem.strip()) if separator else ("command line", text)


def resolve_arguments(args: list[str]) -> tuple[list[str], str | None]:
    """Put the path of a recipe in place of its name, and ask for comments where a recipe is to be printed.

    Recipes come first, wherever they stood: the parser lets a recipe undo what stands before it.

    Returns:
        The arguments, and the name of the last recipe without its suffix, or None without one.
    """
    recipes: list[str] = []
    others: list[str] = []
    name: str | None = None
    rest = iter(args)
    for argument in rest:
        flag, equals, value = argument.partition("=")
        if flag in _RECIPE_FLAGS:
            value = value if equals else next(rest, "")
            if not value:
                raise InputError("--recipe", "names no recipe")
            path = find_recipe(value)
            check_recipe(path)
            name = path.stem
            recipes += ["--recipe", str(path)]
        elif argument == "--print_config":
            others.append("--print_config=comments")
        else:
            others.append(argument)
    return [*recipes, *others], name


def verb_parser(verb: str, description: str, sections: Mapping[str, type]) -> VerbParser:
    """Parser of a verb that reads a recipe and writes a folder, without a Trainer.

    Sections of a recipe of fit that the verb does not read are accepted and left alone.

    Args:
        verb: its name.
        description: what it does, for --help.
        sections: the recipe's sections that it reads, and the dataclass of each.
    """
    p = VerbParser(prog=f"laco_train {verb}", description=description, print_config="--print_config")
    add_recipe_flag(p)
    p.add_argument("--output", type=str, required=True, help="Folder to write; must not exist or be empty.")
    for name, settings in sections.items():
        p.add_class_arguments(settings, name)
    for name in (name for name in (*SECTIONS, "trainer") if name not in sections):
        p.add_argument(f"--{name}", type=dict[str, Any] | None, default=None, help=SUPPRESS)
    p.add_argument("--rounds", type=list[Any] | None, default=None, help=SUPPRESS)
    p.add_argument("--seed_everything", type=bool | int, default=0, help=SUPPRESS)
    return p


def add_recipe_flag(parser: ArgumentParser) -> None:
    """The option that reads a recipe, under the names users try."""
    parser.add_argument(
        "--recipe",
        "-r",
        "--config",
        "-c",
        action=ActionConfigFile,
        help="Recipe: a path, a name under ./recipes, or a shipped one.",
    )
