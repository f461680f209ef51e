"""`bench-inference MODEL...`: speed of reading and writing, time to the first token and memory, beside the first."""

from laco_train.cli.parsing import VerbParser
from laco_train.errors import InputError
from laco_train.files import home
from laco_train.settings import Dtype


def parser() -> VerbParser:
    """The verb's parser."""
    p = VerbParser(
        prog="laco_train bench-inference",
        description="Time models in turns, in one process: prefill and decode tokens per second, time to the first "
        "token, memory; each beside the first one named.",
        print_config=None,
    )
    add = p.add_argument
    model = "Exports, folders, hub ids, .gguf files, package: names; NAME=MODEL gives one a name for the table."
    add("models", nargs="+", type=str, help=model)
    add("--batch-sizes", type=str, default="1,4,16", help="Sequences at a time, separated by commas.")
    add("--prompt-tokens", type=int, default=128, help="Tokens of each prompt, random ones.")
    add("--new-tokens", type=int, default=32, help="Tokens generated after the first.")
    add("--turns", type=int, default=5, help="Turns of each model, loaded anew in each.")
    add("--device", type=str, default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:1.")
    add("--dtype", type=Dtype, default="auto", help="Type of the weights; auto: that of each model.")
    trusted = "Run code that comes with a model (Baichuan2, InternLM2), if you trust that code."
    add("--trust-remote-code", action="store_true", help=trusted)
    add("--output", type=str, default="inference.json", help="File to write; must not exist.")
    return p


def run(args: list[str]) -> None:
    """Check, measure, print and write."""
    config = parser().parse_args(args)
    batches = _batch_sizes(config.batch_sizes)
    for name in ("prompt_tokens", "new_tokens", "turns"):
        if config[name] < 1:
            raise InputError(f"--{name.replace('_', '-')}", f"must be 1 or more, is {config[name]}")
    output = home(config.output)
    if output.exists() or not output.parent.is_dir():
        problem = "exists; name another file or remove it" if output.exists() else "is in no folder that exists"
        raise InputError("--output", f"{output} {problem}")

    import json

    from rich.console import Console

    from laco_train.evaluation.report import rich_table
    from laco_train.evaluation.run import chosen_device, named_models
    from laco_train.files import write_whole
    from laco_train.inference.measure import Workload
    from laco_train.inference.report import as_json, table
    from laco_train.inference.run import check_positions, run_bench

    device = chosen_device(config.device)
    models = named_models(config.models, "models")
    work = Workload(batches, config.prompt_tokens, config.new_tokens, config.turns)
    check_positions(models, work, trust_remote_code=config.trust_remote_code)
    bench = run_bench(models, work, config.dtype, device, trust_remote_code=config.trust_remote_code)
    write_whole(output, json.dumps(as_json(bench), indent=1) + "\n")
    console = Console()
    if not console.is_terminal:  # a file has no width, and 80 columns would break names
        console = Console(width=200)
    shown = table(bench)
    console.print(rich_table(shown))
    print(shown.about)
    print(f"Numbers: {output}", flush=True)


def _batch_sizes(text: str) -> tuple[int, ...]:
    """The numbers in `text`, in order."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= 1 for part in parts) or len(set(parts)) < len(parts):
        raise InputError("--batch-sizes", f"must be different whole numbers from 1, separated by commas, is {text!r}")
    return tuple(map(int, parts))
