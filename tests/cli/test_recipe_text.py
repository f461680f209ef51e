"""Broken recipes, from tests/corpus and made at random: one clear line each, and nothing that they name is run."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from laco_train.checks import check_collapse, check_export, check_model
from laco_train.cli.collapse import parser
from laco_train.cli.parsing import resolve_arguments
from laco_train.errors import InputError
from laco_train.recipes import shipped
from tests.cli.runs import RECIPE, Project
from tests.cli.test_bad_input import refused
from tests.spoilt import spoilt

CORPUS = sorted((Path(__file__).parents[1] / "corpus/recipes").iterdir())
PARSER = parser()
TEXT = yaml.safe_dump(RECIPE).encode()


def read(path: Path) -> Any:
    """The settings of a recipe, as the verb collapse reads them; no model is looked for."""
    arguments, _ = resolve_arguments(["--recipe", str(path), "--output", "new"])
    found = PARSER.instantiate(PARSER.parse_args(arguments))
    check_model(found.model)
    check_collapse(found.collapse)
    check_export(found.export)
    return found


def refusal(path: Path) -> str:
    """The one line that `path` is refused with."""
    with pytest.raises(InputError) as error:
        read(path)
    line = str(error.value)
    assert "\n" not in line and len(line) < 1000
    return line


def test_the_whole_one_is_read(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(TEXT)
    found = read(tmp_path / "recipe.yaml")
    assert (found.model.source, found.collapse.layers_per_merge) == ("model", 2)


# what only a look for the file tells
LATER = {"name_too_long.yaml"}


@pytest.mark.parametrize("path", [path for path in CORPUS if path.name not in LATER], ids=lambda path: path.stem)
def test_corpus(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refusal(path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("bomb.yaml", "bomb.yaml stands for more than 100,000 values"),
        ("deep_list.yaml", "is nested too deeply"),
        ("key_twice.yaml", "has the key model a second time in line 3"),
        ("python_apply.yaml", "python/object/apply:os.system"),
        ("empty_section.yaml", "collapse: is a section, but"),
        ("number_beyond_64_bits.yaml", "model.lora.rank: is a number beyond 64 bits"),
        ("number_that_is_infinite.yaml", "model.optimizer.learning_rate: must be a finite number, is inf"),
        ("seed_below_0.yaml", "seed_everything: must be 0 to 4294967295, is -1"),
        ("null_byte.yaml", "model.source: holds a null byte"),
        ("utf16.yaml", "is not text"),
        ("empty.yaml", "is empty"),
    ],
)
def test_what_is_said(name: str, words: str) -> None:
    (path,) = (path for path in CORPUS if path.name == name)
    assert words in refusal(path)


HANDFUL = ["python_apply", "bomb", "key_twice", "empty_section", "number_of_5000_digits", "name_too_long", "utf16"]


@pytest.mark.parametrize("verb", [["fit"], ["collapse", "--output", "new"], ["study"], ["validate"]])
def test_at_the_command_line(shared_project: Project, verb: list[str]) -> None:
    for path in CORPUS:
        if path.stem in HANDFUL:
            refused(shared_project, *verb, "--recipe", str(path))
    assert not (shared_project.root / "ran").exists()


@pytest.mark.parametrize("verb", [["fit"], ["collapse", "--output", "new"]])
def test_folder_and_values_at_the_command_line(shared_project: Project, verb: list[str]) -> None:
    assert refused(shared_project, *verb, "--recipe", ".")[0] == "--recipe"
    tiny = [*verb, "--recipe", "tiny.yaml"]
    for key, value in (
        ("model.source", "a" * 5000),
        ("collapse.calibration", "a" * 5000),
        ("model.lora.rank", "9" * 30),
        ("model.optimizer.learning_rate", "1e999"),
        ("model.source", "[" * 2000),
    ):
        refused(shared_project, *tiny, f"--{key}", value)
    assert refused(shared_project, *tiny, "--collapse.min_interval", "9" * 5000)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("trainer.accumulate_grad_batches", "0"),
        ("trainer.devices", "-5"),
        ("trainer.gradient_clip_val", ".nan"),
        ("data.train", "a" * 5000 + ".jsonl"),
        ("data.max_tokens", "9" * 20),
        ("ckpt_path", "a" * 5000),
    ],
)
def test_values_that_only_fit_reads(shared_project: Project, key: str, value: str) -> None:
    refused(shared_project, "fit", "--recipe", "tiny.yaml", f"--{key}", value)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_bytes_at_random(tmp_path: Path, data: st.DataObject) -> None:
    """Read, or refused in one line: nothing else."""
    path = tmp_path / "recipe.yaml"
    path.write_bytes(spoilt(data, TEXT))
    try:
        found = read(path)
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
    else:
        assert found.model.optimizer.learning_rate < math.inf


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**63, 10**30, -(2**63), 2**31]),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=3),
    st.dates(),
)
VALUES = st.recursive(
    SCALARS,
    lambda some: st.lists(some, max_size=3) | st.dictionaries(st.text(max_size=3), some, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_values_at_random(tmp_path: Path, data: st.DataObject) -> None:
    """Whatever stands at whatever key: the settings that come out have the types that they promise."""
    recipe = copy.deepcopy(RECIPE)
    section = data.draw(st.sampled_from(["model", "collapse", "export"]))
    keys = sorted(
        {**recipe.get(section, {}), "dtype": 0, "lora": 0, "plan": 0, "remove": 0, "schedule": 0, "calibration": 0}
    )
    recipe.setdefault(section, {})[data.draw(st.sampled_from(keys))] = data.draw(VALUES)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    try:
        found = read(path)
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return
    for name, kind in (("source", str), ("method", str), ("dtype", str), ("trust_remote_code", bool)):
        assert isinstance(getattr(found.model, name), kind)
    assert found.model.trust_remote_code is False
    assert isinstance(found.collapse.layers_per_merge, int) and found.collapse.layers_per_merge >= 2
    assert isinstance(found.model.optimizer.learning_rate, float | int)


@pytest.mark.parametrize("verb", [["collapse", "--output", "quiet"], ["analyze", "--output", "quiet"], ["study"]])
def test_verbs_without_a_trainer_make_nothing_of_what_it_names(project: Project, verb: list[str]) -> None:
    touch = {"class_path": f"{__name__}.Touch", "init_args": {"name": "ran"}}
    trainer = {**RECIPE["trainer"], "callbacks": [touch], "logger": touch}
    recipe = {**RECIPE, "trainer": trainer, "rounds": [touch], "study": {"arms": {"mine": touch}}}
    for section in ("rounds", "study"):
        if (section == "study") != (verb == ["study"]):
            del recipe[section]
    (project.root / "named.yaml").write_text(yaml.safe_dump(recipe))
    project(*verb, "--recipe", "named.yaml")
    assert not (project.root / "ran").exists()


class Touch:
    """Writes a file when it is made."""

    def __init__(self, name: str):
        Path(name).touch()


def test_fit_makes_only_what_its_options_are(project: Project) -> None:
    for option, kind in (
        ("callbacks", list),
        ("logger", dict),
        ("plugins", list),
        ("strategy", dict),
        ("profiler", dict),
    ):
        popen = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "ran"]}}
        recipe = {**RECIPE, "trainer": {**RECIPE["trainer"], option: [popen] if kind is list else popen}}
        (project.root / "named.yaml").write_text(yaml.safe_dump(recipe))
        key, _ = refused(project, "fit", "--recipe", "named.yaml")
        assert key == f"trainer.{option}"
    assert not (project.root / "ran").exists()


def test_remote_code_is_off_unless_asked_for() -> None:
    for path in shipped("recipes").glob("*.yaml"):
        trusted = yaml.safe_load(path.read_text(encoding="utf-8"))["model"].get("trust_remote_code", False)
        assert not trusted or "baichuan" in path.name


@pytest.mark.parametrize("recipe", [["--recipe", "tiny.yaml"], ["--recipe=tiny.yaml"], ["-r", "tiny.yaml"]])
@pytest.mark.parametrize("first", [True, False])
def test_an_option_wins_over_the_recipe_wherever_it_stands(project: Project, recipe: list[str], first: bool) -> None:
    option = ["--model.source", "another", "--collapse.min_interval=3"]
    for verb in ("fit", "validate", "collapse", "analyze", "study"):
        result = project(verb, *(option + recipe if first else recipe + option), "--print_config")
        assert result.code == 0, result.err
        values = yaml.safe_load(result.out)
        assert (values["model"]["source"], values["collapse"]["min_interval"]) == ("another", 3)
