"""`collapse --recipe R --output DIR`: search and write, no training."""

from pathlib import Path

from laco_train.cli.parsing import VerbParser, resolve_arguments, verb_parser
from laco_train.settings import (
    CollapseSettings,
    ExportSettings,
    ModelSettings,
    check_collapse,
    check_export,
    check_model,
)


def parser() -> VerbParser:
    """The verb's parser; sections that only training reads are accepted and left alone."""
    sections = {"model": ModelSettings, "collapse": CollapseSettings, "export": ExportSettings}
    description = "Collapse a model and write it as a Hugging Face folder, without training."
    return verb_parser("collapse", description, sections, unread=("data", "budget", "speed", "rounds", "trainer"))


def run(args: list[str]) -> None:
    """Collapse and write."""
    arguments, recipe = resolve_arguments(args)
    p = parser()
    config = p.parse_args(arguments)
    ready = p.instantiate(config)
    model_settings: ModelSettings = ready.model
    collapse_settings: CollapseSettings = ready.collapse
    check_model(model_settings)
    check_collapse(collapse_settings)
    check_export(ready.export)

    from laco_train.export import refuse_nonempty

    output = Path(config.output)
    refuse_nonempty(output, "--output")

    import torch

    from laco_train.collapse import collapse_model
    from laco_train.collapse.families import depth_of
    from laco_train.collapse.report import describe
    from laco_train.export import CardFacts, export_folder
    from laco_train.models import load_config, load_model, load_tokenizer
    from laco_train.precision import named_dtype, weights_dtype
    from laco_train.progress import search_progress

    s = model_settings
    check_collapse(collapse_settings, depth_of(load_config(s.source, trust_remote_code=s.trust_remote_code)))
    tokenizer = load_tokenizer(s.source, trust_remote_code=s.trust_remote_code)
    dtype = weights_dtype(s.dtype, str(config.trainer.get("precision") or "32-true"))
    print(f"Loading {s.source} as {str(dtype).removeprefix('torch.')}", flush=True)
    model = load_model(s.source, dtype=dtype, trust_remote_code=s.trust_remote_code)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with search_progress(collapse_settings) as on_candidate:
        model, plan = collapse_model(
            model, tokenizer, collapse_settings, source=s.source, device=device, on_candidate=on_candidate
        )
    print("\n".join(describe(plan)), flush=True)
    card = CardFacts(
        base_model=s.source, recipe=recipe or "", method=s.method, data={}, losses={}, tokens=0, steps=0, licence=None
    )
    export_dtype = dtype if ready.export.dtype == "auto" else named_dtype(ready.export.dtype)
    size = ready.export.shard_size
    export_folder(model, tokenizer, output, dtype=export_dtype, plan=plan, card=card, shard_size=size)
