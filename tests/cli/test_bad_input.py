"""Bad input ends with exit code 2, one line that names the key, and nothing written."""

import pickle
from pathlib import Path

import pytest
import torch
import yaml
from transformers import T5Config, T5ForConditionalGeneration

from tests.cli.runs import RECIPE, Project, Result, Run

FIT = ["fit", "--recipe", "tiny.yaml"]
COLLAPSE = ["collapse", "--recipe", "tiny.yaml", "--output", "new"]
# found before anything is read: each verb that knows the key refuses it
SETTINGS = {
    "collapse.layers_per_merge": [("1", "C must be 2 or more"), ("7", "more than the model's 6 layers")],
    "collapse.lowest_layer": [("0", "L counts from 1"), ("6", "not below H = 6")],
    "collapse.highest_layer": [("7", "more than the model's 6 layers"), ("2", "H - C = 2 - 2 is below L = 1")],
    "collapse.min_interval": [("0", "I must be 1 or more")],
    "collapse.similarity_threshold": [("1.01", "-1 to 1"), ("-1.01", "-1 to 1"), ("high", "float")],
    "collapse.calibration": [("[]", "holds no text"), ("empty.txt", "holds no text"), ("missing.txt", "no file")],
    "collapse.merge_rule": [("median", "rdsc")],
    "collapse.remove": [("[1, 1]", "twice"), ("[6]", "the last layer is 5"), ("[-1]", "counts from 0")],
    "collapse.plan": [("missing.json", "can't read")],
    "model.source": [("not_a_model", "no config.json"), ("missing/model", "no folder"), ("t5", "encoder-decoder")],
    "model.method": [("qlora", "full")],
    "model.optimizer.learning_rate": [("0", "above 0"), ("nan", "float"), ("fast", "float")],
    "model.lora.rank": [("0", "1 or more")],
    "export.dtype": [("int8", "float32")],
}
TRAINING = {
    "data.train": [
        ("missing.jsonl", "no file matches"),
        ("empty.txt", "holds no text"),
        ("short.txt", "less than one block of 32"),
        ("folder", "is a folder"),
    ],
    "data.validation": [("missing.jsonl", "no file matches"), ("empty.txt", "holds no text")],
    "data.block_size": [("257", "the model's 256 positions"), ("1", "2 or more"), ("16.5", "int")],
    "data.batch_size": [("0", "1 or more"), ("1000", "make no batch of 1000")],
    "data.max_tokens": [("31", "less than one block of 32")],
    "data.format": [("parquet", "chat")],
    "trainer.precision": [("nonsense", "bf16-true")],
    "trainer.max_steps": [("many", "int")],
    "trainer": [("nonsense", "nonsense")],
}
TRAINER = {  # Lightning itself refuses these, and names the option inside the line
    "accelerator": "nonsense",
    "strategy": "nonsense",
    "devices": "0",
    "gradient_clip_algorithm": "median",
    "limit_train_batches": "2.5",
    "max_time": "soon",
}


@pytest.fixture(scope="module")
def bad_project(shared_project: Project) -> Project:
    """The tiny project, with the wrong things lying about."""
    root = shared_project.root
    for folder in ("folder", "not_a_model", "full"):
        (root / folder).mkdir()
        (root / folder / "notes.txt").write_text("Nothing to see.")
    (root / "empty.txt").touch()
    (root / "empty.yaml").touch()
    (root / "short.txt").write_text("Too short.")
    (root / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    (root / "list.yaml").write_text("- model\n- data\n")
    (root / "broken.yaml").write_text("model: {source: [\n")
    (root / "no_checkpoint.ckpt").write_text("model: no\n")
    (root / "foreign.pkl").write_bytes(pickle.dumps({"weights": [1, 2]}))
    torch.save({"state_dict": {"w": torch.zeros(2)}}, root / "foreign.ckpt")
    torch.save(Path("an object that only code can load"), root / "code.ckpt")
    config = T5Config(vocab_size=64, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(root / "t5")
    return shared_project


def refused(project: Project, *arguments: str) -> tuple[str, str]:
    """Run it; (key, problem) of the one line of error."""
    before = project.files()
    result: Result = project(*arguments)
    assert result.code == 2, result
    lines = [line for line in result.err.splitlines() if line.startswith("laco_train: error: ")]
    assert lines == result.err.splitlines()[-1:], result.err
    assert "Traceback" not in result.err + result.out
    assert project.files() == before
    key, _, problem = lines[0].removeprefix("laco_train: error: ").partition(": ")
    assert problem
    return key, problem


def cases(table: dict[str, list[tuple[str, str]]]) -> list[tuple[str, str, str]]:
    return [(key, value, words) for key, values in table.items() for value, words in values]


@pytest.mark.parametrize(("key", "value", "words"), cases({**SETTINGS, **TRAINING}))
def test_fit_refuses(bad_project: Project, key: str, value: str, words: str) -> None:
    named, problem = refused(bad_project, *FIT, f"--{key}", value)
    assert named == key
    assert words in problem


@pytest.mark.parametrize(("key", "value", "words"), cases(SETTINGS))
def test_collapse_refuses(bad_project: Project, key: str, value: str, words: str) -> None:
    named, problem = refused(bad_project, *COLLAPSE, f"--{key}", value)
    assert named == key
    assert words in problem


@pytest.mark.parametrize(("option", "value"), TRAINER.items())
def test_lightnings_own_refusals_are_one_line(bad_project: Project, option: str, value: str) -> None:
    key, problem = refused(bad_project, *FIT, f"--trainer.{option}", value)
    assert key == "trainer"
    assert value in problem


def test_lora_targets_that_match_nothing(bad_project: Project) -> None:
    for targets in ("[query]", "query", "[q_proj, query]", "self_attn"):
        key, problem = refused(bad_project, *FIT, "--model.method", "lora", "--model.lora.targets", targets)
        assert key == "model.lora.targets"
        assert "q_proj" in problem
        assert "input_layernorm" not in problem


def test_a_run_without_an_end(bad_project: Project) -> None:
    key, _ = refused(bad_project, *FIT, "--trainer.max_steps", "-1", "--trainer.max_epochs", "-1")
    assert key == "trainer.max_steps"


def test_c_that_leaves_nothing_to_try(bad_project: Project) -> None:
    key, problem = refused(bad_project, *FIT, "--collapse.layers_per_merge", "4", "--collapse.lowest_layer", "3")
    assert key == "collapse.highest_layer"
    assert "H - C = 6 - 4 is below L = 3" in problem


@pytest.mark.parametrize("verb", [FIT, COLLAPSE], ids=lambda verb: verb[0])
def test_unknown_key_on_the_command_line(bad_project: Project, verb: list[str]) -> None:
    for key in ("--model.sourcee", "--colapse.layers_per_merge", "--model.lora.rnk", "--nonsense"):
        assert refused(bad_project, *verb, key, "4")[0] == key
    assert refused(bad_project, *verb, "--model.sourcee=4")[0] == "--model.sourcee"


@pytest.mark.parametrize("verb", [FIT, COLLAPSE], ids=lambda verb: verb[0])
@pytest.mark.parametrize("key", ["collapse.layer_per_merge", "model.optimizer.learning_rat", "colapse.x", "modle"])
def test_unknown_key_in_a_recipe(bad_project: Project, verb: list[str], key: str) -> None:
    recipe = yaml.safe_load(yaml.safe_dump(RECIPE))
    *sections, last = key.split(".")
    place = recipe
    for section in sections:
        place = place.setdefault(section, {})
    place[last] = 4
    (bad_project.root / "typo.yaml").write_text(yaml.safe_dump(recipe))
    named, problem = refused(bad_project, *verb, "--recipe", "typo.yaml")
    assert named == key
    assert "--help" in problem


@pytest.mark.parametrize("verb", [FIT, COLLAPSE], ids=lambda verb: verb[0])
@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("missing.yaml", "smollm2_135m_collapse_cpu.yaml"),
        ("folder", "no file"),
        ("binary.yaml", "not text"),
        ("empty.yaml", "empty"),
        ("list.yaml", "sections and keys"),
        ("broken.yaml", "line 2"),
    ],
)
def test_recipe_that_is_none(bad_project: Project, verb: list[str], recipe: str, words: str) -> None:
    key, problem = refused(bad_project, *verb, "--recipe", recipe)
    assert key == "--recipe"
    assert words in problem


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["fit"], "--recipe"),
        (["study", "--arms", "laco"], "--recipe"),
        (["fit", "--model.method", "lora"], "model.source"),
        (["fit", "--recipe"], "--recipe"),
        (["fit", "--recipe", "tiny.yaml", "--model.source"], "--model.source"),
        (["collapse", "--recipe", "tiny.yaml"], "--output"),
        (["collapse", "--output", "new"], "--recipe"),
        (["collapse", "--output", "new", "--model.method", "lora"], "model.source"),
        (["verify"], "folder"),
        (["bench-inference"], "models"),
        (["compare"], "runs"),
        (["export", "--output", "new"], "--checkpoint"),
        (["export", "--checkpoint", "c.ckpt"], "--output"),
        (["train"], "train"),
    ],
)
def test_something_is_missing(bad_project: Project, arguments: list[str], key: str) -> None:
    assert refused(bad_project, *arguments)[0] == key


STRAY = "stands without an option; "


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fit", "tiny.yaml"], "--recipe: is missing; write --recipe tiny.yaml"),
        (["study", "tiny"], "--recipe: is missing; write --recipe tiny"),
        (
            ["fit", "--trainer.max_steps", "3"],
            "--recipe: is missing; name one, by its path or one that is shipped (bai",
        ),
        ([*FIT, "other.yaml"], f"other.yaml: {STRAY}write --recipe other.yaml"),
        ([*COLLAPSE, "there"], f"there: {STRAY}--help lists them"),
        (["evaluate", "model"], f"model: {STRAY}write --model model"),
        (["export", "model"], f"model: {STRAY}write --checkpoint model"),
        (["verify", "one", "two"], f"two: {STRAY}--help lists them"),
        (["verify"], "folder: is missing; the usage is `laco_train verify FOLDER`"),
        (["verify", "--folder", "x"], "--folder: is unknown here; the usage is `laco_train verify FOLDER [options]`"),
        (["bench-inference", "--model", "x"], "--model: is unknown here; the usage is `laco_train bench-inference MOD"),
        (["fit", "--recipe", "arms.yaml"], "study.seeds: is of a study's recipe; run that with the verb study"),
        ([*COLLAPSE[:2], "arms.yaml", "--output", "x"], "study.seeds: is of a study's recipe"),
        (["study", "--recipe", "tiny.yaml"], "--recipe: tiny.yaml has no section study, so it is one of fit"),
        (["evaluate", "--model", "missing/model", "--output", "x"], "model: there is no folder 'missing/model' here"),
    ],
)
def test_what_a_first_user_may_write(bad_project: Project, arguments: list[str], said: str) -> None:
    (bad_project.root / "arms.yaml").write_text(yaml.safe_dump({**RECIPE, "study": {"seeds": [0]}}))
    assert ": ".join(refused(bad_project, *arguments)).startswith(said)


PRECISIONS = (
    "64, 32, 16, transformer-engine, transformer-engine-float16, 16-true, 16-mixed, bf16-true, bf16-mixed, 32-true, "
    "64-true, bf16 or null"
)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("collapse.highest_layer", "top", "must be int or null, is top"),
        ("collapse.merge_rule", "median", "must be rdsc, last, mean or drop, is median"),
        ("collapse.remove", "[1, one]", "must be a list of int or null, is [1, 'one']"),
        ("export.enabled", "maybe", "must be true or false, is maybe"),
        ("trainer.precision", "nonsense", f"must be {PRECISIONS}, is nonsense"),
        ("trainer.callbacks", "Nobody", "must be a list of Callback, Callback or null, is Nobody"),
        ("trainer.callbacks", "nowhere.Nobody", "nowhere.Nobody can't be used: No module named 'nowhere'"),
        ("trainer.callbacks", "[{class_path: EarlyStopping}]", "monitor: is missing; give it"),
        (
            "trainer.logger",
            "{class_path: CSVLogger, init_args: {save_dr: x}}",
            "save_dr: is unknown here; --help lists",
        ),
        ("trainer.plugins", "x" * 100, f"or null, is {'x' * 80} ..."),
        ("rounds", "[{target_depth: deep}]", "target_depth: must be int, is deep"),
        ("model.distill", "yes", "is a section, but is 'yes'; write its keys, or leave it out"),
    ],
)
def test_types_are_told_in_words(bad_project: Project, option: str, value: str, said: str) -> None:
    key, problem = refused(bad_project, *FIT, f"--{option}", value)
    assert key == option
    assert said in problem and len(problem) < 240


def test_options_of_verbs_without_recipe_are_told_as_they_are_written(bad_project: Project) -> None:
    source = ["export", "--checkpoint", "x", "--output", "new", "--gguf-type", "q4"]
    assert refused(bad_project, *source) == ("--gguf-type", "must be f16 or q8_0, is q4")
    assert refused(bad_project, "evaluate", "--model", "x", "--limit", "all") == ("--limit", "must be int, is all")


def test_output_folder_that_is_not_empty(bad_project: Project) -> None:
    for verb in (["collapse", "--recipe", "tiny.yaml"], ["export", "--checkpoint", "no_checkpoint.ckpt"]):
        for output in ("full", "short.txt"):
            key, problem = refused(bad_project, *verb, "--output", output)
            assert key == "--output"
            assert output in problem


@pytest.mark.parametrize("file", ["missing.ckpt", "no_checkpoint.ckpt", "foreign.pkl", "foreign.ckpt", "code.ckpt"])
def test_file_that_is_no_checkpoint(bad_project: Project, file: str) -> None:
    assert refused(bad_project, "export", "--checkpoint", file, "--output", "new")[0] == "--checkpoint"
    for verb in ("fit", "validate"):
        assert refused(bad_project, verb, "--recipe", "tiny.yaml", "--ckpt_path", file)[0] == "--ckpt_path"


def test_checkpoint_that_was_cut_short(bad_project: Project, run: Run) -> None:
    whole = run.checkpoint().read_bytes()
    (bad_project.root / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    key, problem = refused(bad_project, "export", "--checkpoint", "cut.ckpt", "--output", "new")
    assert key == "--checkpoint"
    assert "cut.ckpt is damaged" in problem
    assert refused(bad_project, *FIT, "--ckpt_path", "cut.ckpt")[0] == "--ckpt_path"


def test_checkpoint_of_another_model(bad_project: Project, run: Run) -> None:
    config = yaml.safe_load((bad_project.root / "model" / "config.json").read_text())
    assert config["num_hidden_layers"] == 6
    collapsed = str(run.folder / "export")
    key, problem = refused(bad_project, *FIT, "--model.source", collapsed, "--ckpt_path", str(run.checkpoint()))
    assert key == "collapse.plan"
    assert "6 layers" in problem
