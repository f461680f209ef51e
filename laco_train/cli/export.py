"""`export --checkpoint CKPT --output DIR`: a Hugging Face folder from a training checkpoint."""

from pathlib import Path

from laco_train.cli.parsing import VerbParser
from laco_train.settings import Dtype


def parser() -> VerbParser:
    """The verb's parser."""
    p = VerbParser(
        prog="laco_train export",
        description="Write a training checkpoint as a proven Hugging Face folder.",
        print_config=None,
    )
    p.add_argument("--checkpoint", type=str, required=True, help="A .ckpt file that fit wrote.")
    p.add_argument("--output", type=str, required=True, help="Folder to write; must not exist or be empty.")
    p.add_argument("--dtype", type=Dtype, default="auto", help="Type of the weights; auto: that of the checkpoint.")
    return p


def run(args: list[str]) -> None:
    """Read the checkpoint, make its model, write and prove the folder."""
    config = parser().parse_args(args)

    from laco_train.export import export_folder, refuse_nonempty

    output = Path(config.output)
    refuse_nonempty(output, "--output")

    from laco_train.collapse.composition import from_the_first_model
    from laco_train.export import CardFacts
    from laco_train.precision import named_dtype
    from laco_train.training.checkpoint import read_checkpoint, restore

    print(f"Reading {config.checkpoint}", flush=True)
    checkpoint = read_checkpoint(Path(config.checkpoint))
    model, tokenizer = restore(checkpoint)
    dtype = checkpoint.dtype if config.dtype == "auto" else named_dtype(config.dtype)
    plan = from_the_first_model(checkpoint.plan, checkpoint.model.source)
    card = CardFacts(
        base_model=plan.source if plan.rounds else checkpoint.model.source,
        recipe=checkpoint.recipe,
        method=checkpoint.model.method,
        data=checkpoint.data,
        losses=checkpoint.losses,
        tokens=checkpoint.tokens,
        steps=checkpoint.steps,
        licence=None,
    )
    export_folder(model, tokenizer, output, dtype=dtype, plan=plan, card=card)
