"""`analyze` from its command line to its folder."""

import csv
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import LlamaForCausalLM

from laco_train.cli import main
from tests.collapse.helpers import TEXTS, scramble

RECIPE = """
model:
  source: {source}
collapse:
  layers_per_merge: 2
  target_depth: 3
  calibration: {texts}
data: {{block_size: 8}}
trainer: {{precision: 32-true, max_steps: 1}}
export: {{enabled: false}}
"""


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: Callable[..., LlamaForCausalLM],
    tiny_tokenizer: object,
) -> tuple[LlamaForCausalLM, Path, Path]:
    """The model, its recipe and the folder of an analysis with a sweep."""
    base = tmp_path_factory.mktemp("a<b>")  # a name that HTML must escape
    model = scramble(tiny_llama(layers=5), seed=7)
    for saved in (model, tiny_tokenizer):
        saved.save_pretrained(base / "model")  # type: ignore[attr-defined]
    recipe = base / "recipe.yaml"
    recipe.write_text(RECIPE.format(source=base / "model", texts=json.dumps(TEXTS)), encoding="utf-8")
    output = base / "out"
    arguments = ["--recipe", str(recipe), "--output", str(output), "--sweep", "true"]
    assert main(["analyze", *arguments, "--sweep.similarity_thresholds", "[0.8, 0.2, -1]"]) == 0
    return model, recipe, output


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_csv_values_equal_the_arrays(run: tuple[LlamaForCausalLM, Path, Path]) -> None:
    model, _, output = run
    found = json.loads((output / "analysis.json").read_text())
    assert found["depth"] == 5
    assert {int(row["place_b"]) for row in rows(output / "hidden_states.csv")} == set(range(6))
    for row in rows(output / "hidden_states.csv"):
        assert float(row["cosine"]) == found["state_cosines"][int(row["place_a"])][int(row["place_b"])]
    for layer, row in enumerate(rows(output / "layers.csv")):
        assert int(row["layer"]) == layer
        assert float(row["loss_without"]) == found["losses_without"][layer]
        assert float(row["block_influence"]) == found["block_influence"][layer]
        assert float(row["loss_increase"]) == found["losses_without"][layer] - found["calibration"]["loss"]
    for row, outcome in zip(rows(output / "sweep.csv"), found["sweep"]["outcomes"], strict=True):
        assert {name: float(row[name]) for name in outcome} == outcome
    for row in rows(output / "parameters.csv"):
        if row["module"] != "whole layer":
            a, b = (model.model.layers[int(row[key])].get_parameter(row["module"]) for key in ("layer_a", "layer_b"))
            cosine = torch.cosine_similarity(a.detach().flatten().double(), b.detach().flatten().double(), dim=0)
            assert float(row["cosine"]) == pytest.approx(cosine.item(), abs=1e-6)


def test_page_is_self_contained_and_escaped(run: tuple[LlamaForCausalLM, Path, Path]) -> None:
    output = run[2]
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "http:" not in page
    assert "https:" not in page
    assert not re.search(r"@import|url\(|<script|<link", page)
    sources = re.findall(r'(?:src|srcset|href)="([^"]*)"', page)
    assert len(sources) == 2 * len(list(output.glob("*.png"))) == 2 * 13
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "a&lt;b&gt;" in page
    assert "a<b>" not in page


def test_sweep_recommends_and_lists_c_two_to_four(run: tuple[LlamaForCausalLM, Path, Path]) -> None:
    sweep = json.loads((run[2] / "analysis.json").read_text())["sweep"]
    assert [outcome["layers_per_merge"] for outcome in sweep["outcomes"]] == [2] * 3 + [3] * 3 + [4] * 3
    assert sweep["recommendation"]["outcome"] in sweep["outcomes"]
    page = (run[2] / "report.html").read_text(encoding="utf-8")
    assert all(option in page for option in sweep["recommendation"]["options"])
    assert "--collapse.target_depth null" in sweep["recommendation"]["options"]


def test_tensorboard_has_the_pictures_and_curves(run: tuple[LlamaForCausalLM, Path, Path]) -> None:
    events = EventAccumulator(str(run[2])).Reload()
    assert {Path(tag).name for tag in events.Tags()["images"]} == {path.stem for path in run[2].glob("*.png")}
    losses = [round(event.value, 3) for event in events.Scalars("layers/loss_without")]
    assert losses == [round(float(row["loss_without"]), 3) for row in rows(run[2] / "layers.csv")]


def test_without_a_sweep_there_is_none(run: tuple[LlamaForCausalLM, Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "plain"
    assert main(["analyze", "--recipe", str(run[1]), "--output", str(output), "--sweep=false"]) == 0
    assert json.loads((output / "analysis.json").read_text())["sweep"] is None
    assert not (output / "sweep.csv").exists()
    assert "Sweep" not in (output / "report.html").read_text(encoding="utf-8")


def test_streamed_weights_are_no_matter_for_a_strategy_that_does_not_run(
    run: tuple[LlamaForCausalLM, Path, Path], tmp_path: Path
) -> None:
    output = tmp_path / "streamed"
    options = ["--collapse.strategy", "streamline", "--collapse.placement", "stream"]
    assert main(["analyze", "--recipe", str(run[1]), "--output", str(output), *options]) == 0
    found, expected = (json.loads((each / "analysis.json").read_text()) for each in (output, run[2]))
    assert found["losses_without"] == pytest.approx(expected["losses_without"], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--sweep.layers_per_merge", "[9]"], "sweep.layers_per_merge: has 9, the most is 5"),
        (["--sweep.min_interval", "[0]"], "sweep.min_interval: has 0, the least is 1"),
        (["--collapse.calibration", "['x']"], "collapse.calibration: no sample has two tokens"),
    ],
)
def test_bad_input_writes_nothing(
    run: tuple[LlamaForCausalLM, Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    problem: str,
) -> None:
    output = tmp_path / "out"
    assert main(["analyze", "--recipe", str(run[1]), "--output", str(output), *options]) == 2
    assert problem in capsys.readouterr().err
    assert not output.exists()


def test_refuses_a_folder_in_use(run: tuple[LlamaForCausalLM, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", "--recipe", str(run[1]), "--output", str(run[2])]) == 2
    assert "--output" in capsys.readouterr().err


def test_help_imports_no_torch() -> None:
    code = (
        "import sys\nfrom laco_train.cli import main\n"
        "try:\n    main(['analyze', '--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'lightning', 'matplotlib'} & set(sys.modules), 'heavy import'"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "--sweep.similarity_thresholds" in found.stdout
    assert "Nats per calibration token" in found.stdout
