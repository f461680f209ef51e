"""`analyze --recipe R --output DIR`: why layers collapse, as a page, pictures and tables."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from laco_train.analysis.settings import SweepSettings, check_sweep
from laco_train.checks import check_collapse, check_model
from laco_train.cli.parsing import VerbParser, resolve_arguments, verb_parser
from laco_train.files import home
from laco_train.settings import CollapseSettings, ModelSettings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from laco_train.analysis.result import Analysis, Sweep
    from laco_train.collapse.decoder import Decoder
    from laco_train.collapse.walk import Walk


def parser() -> VerbParser:
    """The verb's parser."""
    sections = {"model": ModelSettings, "collapse": CollapseSettings, "sweep": SweepSettings}
    description = "Compare the layers of a model, and sweep over settings of the collapse; the model stays as it is."
    return verb_parser("analyze", description, sections)


def run(args: list[str]) -> None:
    """Analyse and write."""
    arguments, _ = resolve_arguments(_spelt_out(args))
    p = parser()
    config = p.parse_args(arguments)
    ready = p.instantiate(config)
    model_settings: ModelSettings = ready.model
    collapse_settings: CollapseSettings = ready.collapse
    sweep_settings: SweepSettings = ready.sweep
    check_model(model_settings)
    check_collapse(collapse_settings)
    check_sweep(sweep_settings)

    from laco_train.export import refuse_nonempty

    output = home(config.output)
    refuse_nonempty(output, "--output")

    import torch

    from laco_train.analysis.page import headline
    from laco_train.analysis.write import write_analysis
    from laco_train.collapse.families import depth_of
    from laco_train.models import load_config, load_model, load_tokenizer
    from laco_train.precision import weights_dtype
    from laco_train.progress import bar

    s = model_settings
    depth = depth_of(load_config(s.source, trust_remote_code=s.trust_remote_code))
    check_sweep(sweep_settings, depth)
    tokenizer = load_tokenizer(s.source, trust_remote_code=s.trust_remote_code)
    dtype = weights_dtype(s.dtype, str((config.trainer or {}).get("precision") or "32-true"))
    print(f"Loading {s.source} as {str(dtype).removeprefix('torch.')}", flush=True)
    model = load_model(s.source, dtype=dtype, trust_remote_code=s.trust_remote_code)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        print("No GPU found: this runs on the CPU", flush=True)
    analysis = _analyse(model, tokenizer, device, s.source, collapse_settings, sweep_settings)
    with bar() as progress:
        task = progress.add_task("Drawing", total=None)
        page = write_analysis(analysis, output, lambda done, of: progress.update(task, completed=done, total=of))
    print("\n".join(headline(analysis)))
    print(f"Page: {page}   tables and pictures beside it   curves: tensorboard --logdir {output}", flush=True)


def _spelt_out(args: list[str]) -> list[str]:
    """`--sweep true`, the short form, as the key that it stands for."""
    joined: list[str] = []
    for argument in args:
        if joined and joined[-1] == "--sweep":
            joined[-1] = f"--sweep={argument}"
        else:
            joined.append(argument)
    short = {f"--sweep={word}": f"--sweep.enabled={word}" for word in ("true", "false")}
    return [short.get(argument, argument) for argument in joined]


def _analyse(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    device: "torch.device",
    source: str,
    collapse: CollapseSettings,
    sweep: SweepSettings,
) -> "Analysis":
    """Everything, each part under a bar of its own; the cheap refusals come first."""
    from laco_train.analysis.parameters import compare_parameters, parameter_names
    from laco_train.analysis.result import Analysis
    from laco_train.analysis.states import losses_without_each, state_cosines
    from laco_train.analysis.sweep import sweep_grid
    from laco_train.collapse import count_parameters, decoder_of
    from laco_train.collapse.apply import placed
    from laco_train.collapse.similarity import calibration_batch, read_calibration
    from laco_train.collapse.walk import Walk
    from laco_train.collapse.windows import refuse_unmergeable
    from laco_train.progress import bar

    decoder = decoder_of(model)
    grid = sweep_grid(sweep, collapse, decoder.depth) if sweep.requested else []
    if grid:
        refuse_unmergeable(decoder, grid)
    batch = calibration_batch(tokenizer, read_calibration(collapse.calibration))
    # streamed weights need room for the largest window; without a sweep nothing is chosen, so by no strategy
    unswept = dataclasses.replace(collapse, strategy="laco")
    settings = max(grid, key=lambda one: one.layers_per_merge, default=unswept)
    with placed(decoder, settings, device) as placement:
        with _layers_counted(decoder, "Hidden states and loss of the original", passes=2):
            walk = Walk(decoder, batch, settings, placement)
            walk.calibration_loss.refuse_inexact()
        original_loss = walk.measure_standing(losses=True).loss
        assert original_loss is not None
        states = state_cosines(walk.states(), walk.mask)
        with bar() as progress:
            names = progress.track(parameter_names(decoder.stack), description="Comparing parameters, by module")
            modules = compare_parameters(list(decoder.stack), names)
        with bar() as progress:
            losses = progress.track(losses_without_each(walk), decoder.depth, description="Loss without each layer")
            losses_without = tuple(losses)
        swept = _sweep(walk, grid, collapse, original_loss, sweep.max_loss_increase) if grid else None
    return Analysis(
        source=source,
        parameters=count_parameters(model),
        dtype=str(model.dtype).removeprefix("torch."),
        samples=batch.samples,
        tokens=batch.tokens,
        modules=tuple(modules),
        states=states,
        original_loss=original_loss,
        losses_without=losses_without,
        sweep=swept,
    )


def _sweep(
    walk: "Walk", grid: list[CollapseSettings], base: CollapseSettings, original_loss: float, allowed: float
) -> "Sweep":
    from laco_train.analysis.result import Sweep
    from laco_train.analysis.sweep import recommend, run_sweep
    from laco_train.progress import bar

    with bar() as progress:
        task = progress.add_task("Sweeping over settings", total=len(grid))
        outcomes = run_sweep(walk, grid, lambda done: progress.update(task, completed=done))
    depth = walk.decoder.depth
    recommendation = recommend(outcomes, base, source_depth=depth, original_loss=original_loss, allowed=allowed)
    return Sweep(tuple(outcomes), recommendation, allowed)


@contextmanager
def _layers_counted(decoder: "Decoder", description: str, *, passes: int) -> Iterator[None]:
    """A bar over the layers that `passes` forward passes of the model run."""
    from laco_train.progress import bar

    with bar() as progress:
        total = passes * decoder.depth
        task = progress.add_task(description, total=total)
        handles = [layer.register_forward_hook(lambda *_: progress.advance(task)) for layer in decoder.stack]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        progress.update(task, completed=total)
