"""What parsers say is wrong, in one line: the key, and what is the matter with it. Imports no torch."""

import re
from collections.abc import Iterator, Mapping

# jsonargparse's messages that name the key in the middle; the rest begin with it
_UNKNOWN = re.compile(
    r"unrecognized arguments: (?P<flag>[^\s=]+)"
    r"|(Group '(?P<group>\S+)'|Subcommand '\S+') does not accept option '(?P<key>\S+)'"
    r"|Option '(?P<option>\S+)' is not accepted"
)
_MISSING = re.compile(r"the following arguments are required: ((fit|validate)\.)?(?P<key>[^\s,]+)")
_NO_RECIPE = re.compile(r"(Problems parsing config|Unexpected config): ?(?P<problem>.*)")
RECIPES = (".yaml", ".yml")
"""How names of recipes end."""
# of values of a wrong type
_UNION = re.compile(
    r"Subtypes: \[(?P<types>.*?)\]\n\s*Errors:\n(?P<errors>.*?)\n"
    r"\s*Given value type: [^\n]*\n\s*Given value: (?P<value>.*)",
    re.DOTALL,
)
_ONE = re.compile(r"Expected an? (?P<types>\S.*?)\. Got value: (?P<value>.*)", re.DOTALL)
_NESTED = re.compile(r"\s*- -*(?P<key>[a-z_][\w.]*): (?P<problem>.*)")
_UNUSABLE = re.compile(r"Problem with given class_path '(?P<path>.*?)':(?P<problem>.*?)(?=\n\s*- |$)", re.DOTALL)
_SECTION = re.compile(r"\s*Unable to load config '(?P<value>.*?)'\n", re.DOTALL)
_KIND = re.compile(r"(?:\w+\.)*(?P<name>\w+)\[(?P<of>.*)\]", re.DOTALL)
_NAMES = {"NoneType": ("null",), "bool": ("true", "false"), "dict": ("keys with values",), "list": ("a list",)}
_LONGEST = 80
"""Characters of a value that are shown."""


def key_and_problem(
    message: str, stray: str, usage: tuple[str, str] | None = None, options: Mapping[str, str] | None = None
) -> tuple[str, str]:
    """What an InputError is made of.

    Args:
        message: the parser's.
        stray: the option that a value without one was likely meant for.
        usage: name of what stands without an option, and how; None: nothing does.
        options: by key, where keys are options.
    """
    text = " ".join(line.strip(" -") for line in message.splitlines() if line.strip())
    if found := _UNKNOWN.search(text):
        key = ".".join(part for part in found.group("flag", "group", "key", "option") if part)
        if found["flag"] and not key.startswith("-"):
            fits = stray != "--recipe" or key.endswith(RECIPES)
            return key, f"stands without an option; {f'write {stray} {key}' if fits else '--help lists them'}"
        if found["group"] is None and key.startswith("study."):
            return key, "is of a study's recipe; run that with the verb study"
        if usage is not None:
            return key, f"is unknown here; the usage is `{usage[1]} [options]`, and --help lists these"
        return key, "is unknown here; --help lists every key"
    if found := _MISSING.search(text):
        if usage is not None and found["key"] == usage[0]:
            return usage[0], f"is missing; the usage is `{usage[1]}`"
        return found["key"] if "." in found["key"] else f"--{found['key']}", "is missing; give it"
    if found := _NO_RECIPE.search(text):
        return "--recipe", f"is no YAML of sections and keys ({found['problem'] or 'it is empty'})"
    key, separator, problem = message.removeprefix("Parser key ").removeprefix("argument ").partition(":")
    if not separator:
        return "command line", text
    key = key.strip("'\" ")
    return (options or {}).get(key, key), _in_words(problem.removeprefix("\n"))


def _in_words(message: str) -> str:
    """What is wrong with the value that `message` of the parser, all lines of it but the key, is about.

    A key inside the value that is wrong by itself is named; a message about anything else is put on one line.
    """
    if found := _SECTION.match(message):
        return f"is a section, but is {found['value']!r}; write its keys, or leave it out"
    if found := _UNION.search(message):
        if nested := _NESTED.search(found["errors"]):
            return f"{nested['key']}: {nested['problem']}"
        if named := _UNUSABLE.search(found["errors"]):
            return f"{named['path']} can't be used: {named['problem']}"
        return _must_be(found["types"], found["value"])
    if found := _ONE.search(message):
        return _must_be(found["types"], found["value"])
    return " ".join(line.strip(" -") for line in message.splitlines() if line.strip())


def _must_be(types: str, value: str) -> str:
    *first, last = dict.fromkeys(words for kind in _apart(types) for words in _words(kind))
    taken = f"{', '.join(first)} or {last}" if first else last
    shown = " ".join(value.split())
    return f"must be {taken}, is {shown if len(shown) <= _LONGEST else f'{shown[:_LONGEST]} ...'}"


def _words(kind: str) -> Iterator[str]:
    """What values of a type, as Python writes it, are called; several for those that offer a choice."""
    if (found := _KIND.fullmatch(kind)) is None:
        name = kind.removeprefix("<class '").removesuffix("'>").rpartition(".")[2]
        yield from _NAMES.get(name, (name,))
    elif found["name"] == "Literal":
        yield from (value.strip("'\"") for value in _apart(found["of"]))
    elif found["name"] == "Union":
        yield from (words for one in _apart(found["of"]) for words in _words(one))
    elif found["name"] == "dict":
        yield from _NAMES["dict"]
    else:
        yield f"a list of {' or '.join(words for one in _apart(found['of']) for words in _words(one))}"


def _apart(text: str) -> list[str]:
    """`text` parted at the commas that are in no brackets."""
    parts, depth = [""], 0
    for sign in text:
        depth += (sign == "[") - (sign == "]")
        if sign == "," and not depth:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts]
