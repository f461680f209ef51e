"""What the parsers of all verbs share: one-line errors, and recipes found by name. Imports no torch."""

from collections.abc import Mapping
from typing import Any, NoReturn

from jsonargparse import SUPPRESS, ActionConfigFile, ArgumentParser, set_parsing_settings

from laco_train.cli.parser_errors import RECIPES, key_and_problem
from laco_train.cli.recipe_text import check_recipe
from laco_train.cli.values import check_values
from laco_train.errors import InputError
from laco_train.recipes import find_recipe, shipped
from laco_train.settings import SECTIONS

# --help shows the line under each field of laco_train.settings
set_parsing_settings(docstring_parse_attribute_docstrings=True)
# a class_path in what a verb only passes on, or leaves alone, would be made an object, which runs code
set_parsing_settings(instantiate_subclass_spec_in_any=False)
# its list of what runs commands, such as os and subprocess, is a list of warnings unless it is added to
set_parsing_settings(import_path_denylist=[])

_RECIPE_FLAGS = ("--recipe", "-r", "--config", "-c")


class OneLineErrors:
    """Mixin of argument parsers: an error is an InputError instead of a usage text and an exit.

    Attributes:
        stray: the option that a value without one was likely meant for.
    """

    stray = "--recipe"

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
        raise InputError(*key_and_problem(message, self.stray))


class VerbParser(OneLineErrors, ArgumentParser):
    """Parser of a verb that needs no Trainer."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """As other parsers, with the usage of what stands without an option; a verb without recipe has no keys."""
        alone = next((action.dest for action in self._actions if not action.option_strings), None)
        usage = None if alone is None else (alone, f"{self.prog} {alone.upper()}")
        options = {action.dest: action.option_strings[-1] for action in self._actions if action.option_strings}
        raise InputError(*key_and_problem(message, self.stray, usage, {} if "recipe" in options else options))


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
    if name is None:
        _require_recipe(args)
    return [*recipes, *others], name


def _require_recipe(args: list[str]) -> None:
    """InputError unless the model, which no verb does without, is named on the command line, or help is asked for."""
    given = [argument.partition("=")[0] for argument in args]
    if any(one.startswith(("--model", "-h", "--help", "--print_config")) or one.endswith(".help") for one in given):
        return
    known = ", ".join(sorted(path.stem for path in shipped("recipes").glob("*.yaml")))
    likely = [argument for argument in args if argument.endswith(RECIPES) and not argument.startswith("-")]
    likely += [argument for argument in args[:1] if not argument.startswith("-")]
    told = f"write --recipe {likely[0]}" if likely else f"name one, by its path or one that is shipped ({known})"
    raise InputError("--recipe", f"is missing; {told}")


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
