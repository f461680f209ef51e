"""`collapse --recipe R --output DIR`: search and write, no training."""

import copy

from laco_train.checks import check_collapse, check_data, check_export, check_model, check_one_of, check_static
from laco_train.cli.parsing import VerbParser, resolve_arguments, verb_parser
from laco_train.files import home
from laco_train.settings import CollapseSettings, DataSettings, ExportSettings, ModelSettings


def parser() -> VerbParser:
    """The verb's parser; sections that only training reads are accepted and left alone."""
    sections = {"model": ModelSettings, "collapse": CollapseSettings, "data": DataSettings, "export": ExportSettings}
    description = "Collapse a model and write it as a Hugging Face folder, without training."
    return verb_parser("collapse", description, sections)


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
    check_data(ready.data)
    check_export(ready.export)
    check_one_of(config.rounds, collapse_settings)
    check_static("model.from_scratch", not model_settings.from_scratch, "is for fit, which trains; set it to false")

    from laco_train.export import refuse_nonempty

    output = home(config.output)
    refuse_nonempty(output, "--output")

    import torch

    from laco_train.collapse import collapse_model
    from laco_train.collapse.families import depth_of
    from laco_train.collapse.report import describe
    from laco_train.collapse.unmerged import refuse_nothing_merged
    from laco_train.export import CardFacts, export_folder
    from laco_train.models import load_config, load_model, load_tokenizer
    from laco_train.precision import forward_context, named_dtype, weights_dtype
    from laco_train.progress import search_progress
    from laco_train.refine import Place, leading_batches, refine
    from laco_train.training.data import PackedText

    s, r = model_settings, collapse_settings.refine
    model_config = load_config(s.source, trust_remote_code=s.trust_remote_code)
    check_collapse(collapse_settings, depth_of(model_config))
    if r.tokens:  # else no block is made
        check_data(ready.data, getattr(model_config, "max_position_embeddings", None))
    tokenizer = load_tokenizer(s.source, trust_remote_code=s.trust_remote_code)
    precision = str((config.trainer or {}).get("precision") or "32-true")
    dtype = weights_dtype(s.dtype, precision, "full" if r.tokens and r.windows < 1 else None)
    print(f"Loading {s.source} as {str(dtype).removeprefix('torch.')}", flush=True)
    model = load_model(s.source, dtype=dtype, trust_remote_code=s.trust_remote_code)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    original = copy.deepcopy(model) if r.tokens else None
    with search_progress(collapse_settings) as on_candidate:
        model, plan = collapse_model(
            model, tokenizer, collapse_settings, source=s.source, device=device, on_candidate=on_candidate
        )
    if original is not None:
        refuse_nothing_merged(plan)
        for each in (original, model):
            each.to(device)  # type: ignore[arg-type]  # Transformers wraps to() for bitsandbytes
        data = PackedText(ready.data, lambda: tokenizer)
        data.setup()
        place = Place(device, forward_context(precision, device))
        plan = refine(original, model, plan, leading_batches(data, r), r, place)
    print("\n".join(describe(plan)), flush=True)
    card = CardFacts(
        base_model=s.source, recipe=recipe or "", method=s.method, data={}, losses={}, tokens=0, steps=0, licence=None
    )
    export_dtype = dtype if ready.export.dtype == "auto" else named_dtype(ready.export.dtype)
    size = ready.export.shard_size
    export_folder(model, tokenizer, output, dtype=export_dtype, plan=plan, card=card, shard_size=size)
