"""One model after another through tasks, text and prompts; each is loaded, measured and let go."""

import gc
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, __version__

from laco_train.collapse import count_parameters
from laco_train.errors import InputError
from laco_train.evaluation.harness import TaskRow, evaluate, require_harness
from laco_train.evaluation.perplexity import Perplexity, check_windows, measure_perplexity
from laco_train.evaluation.result import Evaluation, ModelResult
from laco_train.evaluation.samples import check_prompts, continuations
from laco_train.models import load_config, load_model, load_tokenizer
from laco_train.options import keys_of_options
from laco_train.precision import named_dtype
from laco_train.progress import bar
from laco_train.settings import Dtype
from laco_train.training.cache import canonical_text
from laco_train.training.sources import resolve

_LABEL = re.compile(r"(?P<name>[\w.-]+)=(?P<source>.+)")


@dataclass(frozen=True)
class Named:
    """A model to measure: its name in the tables, and what the models module reads it from."""

    name: str
    source: str


@dataclass(frozen=True)
class Measures:
    """What to measure of every model.

    Attributes:
        tasks: of `load_tasks`.
        limit: most questions of a task; None: all.
        text: for perplexity; None: none.
        block: tokens of a window of it.
        stride: tokens from one window to the next.
        prompts: to write on after.
        batch_size: sequences in one forward pass.
        dtype: of the weights; auto: as the model's config says on a GPU, float32 on the CPU.
        trust_remote_code: run code that comes with a model.
    """

    tasks: Sequence[TaskRow]
    limit: int | None
    text: str | None
    block: int
    stride: int
    prompts: tuple[str, ...]
    batch_size: int
    dtype: Dtype
    trust_remote_code: bool


def named_models(sources: Sequence[str], key: str = "--model") -> list[Named]:
    """Models by ``NAME=SOURCE`` or ``SOURCE``, whose name then is its last part, or the last two of ``RUN/export``.

    `key` is the option that named them.

    Raises:
        InputError: two of one name.
    """
    found = [_named(source) for source in sources]
    names = [one.name for one in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(key, f"two models are called {twice[0]}; name them: A=DIR1 B=DIR2")
    return found


def _named(source: str) -> Named:
    labelled = _LABEL.fullmatch(source)
    if labelled is not None and not os.path.exists(source):
        return Named(labelled["name"], labelled["source"])
    # resolved, as "." and "export" alone name nothing
    parts = Path(source).resolve().parts if os.path.exists(source) else Path(source).parts
    return Named("/".join(parts[-2:]) if parts[-1] == "export" else parts[-1], source)


def read_text(files: Sequence[str]) -> str:
    """The documents of `files` that training would take, a blank line between each two.

    Raises:
        InputError: a file that is not there or can't be read, or a row that holds no text.
    """
    with keys_of_options():
        rows = (row for source in resolve("--perplexity", list(files)) for row in source.rows("text"))
        documents = [canonical_text(row, chat=False) for row in rows]
    return "\n\n".join(text for text in documents if text.strip())


def chosen_device(name: str) -> torch.device:
    """The device called `name`; auto: a GPU if there is one.

    Raises:
        InputError: there is no such device here.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError("--device", f"{name} can't be used ({str(error).splitlines()[0]}); name auto or cpu") from None
    return device


def check_models(
    models: Sequence[Named], block: int | None, prompts: Sequence[str], *, trust_remote_code: bool
) -> None:
    """Read every config before anything runs, so that a wrong name costs no measured model.

    Args:
        models: to be measured.
        block: tokens of a window, where a text is measured; None else.
        prompts: to write on after; empty: none.
        trust_remote_code: run code that comes with a model.

    Raises:
        InputError: a model that can't be read, or that has no positions for a window or a prompt.
    """
    for one in models:
        with keys_of_options():
            config = load_config(one.source, trust_remote_code=trust_remote_code)
        positions = getattr(config, "max_position_embeddings", None)
        if block is not None:
            check_windows(block, block, positions)
        if prompts:
            tokenizer = load_tokenizer(one.source, trust_remote_code=trust_remote_code)
            check_prompts(prompts, tokenizer, positions)


def measure_all(models: Sequence[Named], has_baseline: bool, what: Measures, device: torch.device) -> Evaluation:
    """Measure `models` in turn; only one is in memory at a time.

    Raises:
        InputError: a model that can't be read, fits not in memory, or gives what is no number.
    """
    found = []
    for one in models:
        print(f"{one.name}: loading {one.source}", flush=True)
        try:
            found.append(_measure(one, what, device))
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
            raise InputError("--batch-size", f"no room for {one.name} ({reason}); lower it") from error
        finally:
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    versions = {"torch": torch.__version__, "transformers": __version__}
    if what.tasks:
        versions["lm-eval"] = require_harness()
    words = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device).upper()
    return Evaluation(tuple(found), has_baseline, what.prompts, words, what.limit, versions)


def _measure(one: Named, what: Measures, device: torch.device) -> ModelResult:
    config = load_config(one.source, trust_remote_code=what.trust_remote_code)
    tokenizer = load_tokenizer(one.source, trust_remote_code=what.trust_remote_code)
    dtype = _dtype(what.dtype, config, device)
    model = load_model(one.source, dtype=dtype, trust_remote_code=what.trust_remote_code)
    model.to(device)  # type: ignore[arg-type]
    scores = evaluate(model, tokenizer, what.tasks, batch_size=what.batch_size, limit=what.limit) if what.tasks else []
    return ModelResult(
        name=one.name,
        source=one.source,
        layers=config.get_text_config().num_hidden_layers,
        parameters=count_parameters(model),
        dtype=str(model.dtype).removeprefix("torch."),
        scores=tuple(scores),
        perplexity=_perplexity(model, tokenizer, what),
        written=_written(model, tokenizer, what.prompts),
    )


def _dtype(name: Dtype, config: PretrainedConfig, device: torch.device) -> torch.dtype:
    if name != "auto":
        return named_dtype(name)
    own = config.dtype if device.type != "cpu" else None
    return own if isinstance(own, torch.dtype) else torch.float32


def _perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, what: Measures) -> Perplexity | None:
    if what.text is None:
        return None
    with bar() as progress:
        task = progress.add_task("Perplexity", total=None)
        return measure_perplexity(
            model,
            tokenizer,
            what.text,
            block=what.block,
            stride=what.stride,
            batch_size=what.batch_size,
            on_window=lambda done, of: progress.update(task, completed=done, total=of),
        )


def _written(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: tuple[str, ...]) -> tuple[str, ...]:
    if not prompts:
        return ()
    with bar() as progress:
        task = progress.add_task("Samples", total=len(prompts))
        written = continuations(
            model, tokenizer, prompts, on_prompt=lambda done, of: progress.update(task, completed=done)
        )
    return tuple(written)
