"""Which kernels a run trains with is said once, shown and kept."""

import pytest

from tests.cli.runs import Run, events

KERNELS = "Transformers' own"


def test_choice_is_printed_once(run: Run) -> None:
    depth = run.summary()["depth"]
    lines = [line for line in run.result.out.splitlines() if line.startswith("Kernels: ")]
    assert lines == [f"Kernels: {KERNELS}; 0 of {depth} layers recompute."]


def test_choice_is_shown_in_tensorboard(run: Run) -> None:
    (text,) = events(run.folder).Tensors("kernels/text_summary")
    (shown,) = text.tensor_proto.string_val
    assert shown.decode() == f"{KERNELS}; 0 of {run.summary()['depth']} layers recompute."


@pytest.mark.parametrize(("name", "value"), [("kernels", KERNELS), ("checkpointed_layers", 0)])
def test_choice_is_kept_in_the_summary(run: Run, name: str, value: object) -> None:
    assert run.summary()[name] == value
