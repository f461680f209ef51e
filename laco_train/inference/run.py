"""From the names of models to what was measured of them."""

import platform
from collections.abc import Sequence
from functools import partial

import torch
import transformers

from laco_train.errors import InputError
from laco_train.evaluation.run import Named
from laco_train.inference.load import load_as_saved
from laco_train.inference.measure import Measured, Workload, in_words, measure, memory_in_words
from laco_train.inference.result import Bench
from laco_train.models import load_config
from laco_train.options import keys_of_options
from laco_train.progress import bar
from laco_train.settings import Dtype


def check_positions(models: Sequence[Named], work: Workload, *, trust_remote_code: bool) -> None:
    """Read every config before anything runs, so that a wrong name costs no measured model.

    Raises:
        InputError: a model that can't be read, or that has fewer positions than `work` takes.
    """
    for one in models:
        with keys_of_options():
            config = load_config(one.source, trust_remote_code=trust_remote_code)
        known = getattr(config, "max_position_embeddings", None)
        if known is not None and work.positions > known:
            problem = f"and --new-tokens are {work.positions} together, more than the {known} positions of {one.name}"
            raise InputError("--prompt-tokens", problem)


def run_bench(
    models: Sequence[Named], work: Workload, dtype: Dtype, device: torch.device, *, trust_remote_code: bool
) -> Bench:
    """Measure `models` in turns, with a bar.

    Args:
        models: the first is what ratios are to.
        work: what they do.
        dtype: of the weights; auto: as each is saved.
        device: where.
        trust_remote_code: run code that comes with a model.

    Raises:
        InputError: a model whose weights can't be read.
    """
    load = partial(load_as_saved, dtype=dtype, trust_remote_code=trust_remote_code)
    loaders = {one.name: partial(load, one.source) for one in models}
    with bar() as progress:
        task = progress.add_task("Inference", total=None)
        found = measure(loaders, work, device, lambda done, of: progress.update(task, completed=done, total=of))
    measured: dict[str, Measured] = {}
    for name, one_found in found.items():
        if isinstance(one_found, str):
            raise InputError("models", f"{name} can't be measured ({one_found})")
        measured[name] = one_found
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    sources = {one.name: one.source for one in models}
    return Bench(sources, measured, work, in_words(device), memory_in_words(device), versions)
