"""`compare RUN_OR_EXPORT... --output DIR`: runs that exist, side by side, as a page, pictures and tables."""

from pathlib import Path

from laco_train.cli.parsing import VerbParser
from laco_train.errors import InputError
from laco_train.files import home


def parser() -> VerbParser:
    """The verb's parser."""
    p = VerbParser(
        prog="laco_train compare",
        description="Compare finished runs of fit, studies and exported models: losses, what was recovered and "
        "inherited, size and speed.",
        print_config=None,
    )
    p.add_argument("runs", nargs="+", type=str, help="Folders: runs of fit, whole studies, or exported models.")
    p.add_argument(
        "--output", type=str, default="comparison", help="Folder to write; must not exist or be empty (%(default)s)."
    )
    p.add_argument(
        "--reference",
        type=str,
        default="original",
        help="Name of the run that is the uncollapsed model trained on alike (%(default)s: collapse.strategy none).",
    )
    p.add_argument(
        "--speed", type=bool, default=True, help="Measure inference of the exported models; true unless told otherwise."
    )
    trusted = "Run code that comes with a model (Baichuan2, InternLM2), if you trust that code."
    p.add_argument("--trust-remote-code", action="store_true", help=trusted)
    p.add_argument("--force", action="store_true", help="Compare runs of unlike validation data all the same.")
    return p


def run(args: list[str]) -> None:
    """Read, measure and write."""
    config = parser().parse_args(args)

    from laco_train.export import refuse_nonempty
    from laco_train.progress import bar
    from laco_train.study.curves import arms_of
    from laco_train.study.read import read_runs

    output = home(config.output)
    refuse_nonempty(output, "--output")
    runs = [one for folder in config.runs for one in read_runs(Path(folder))]

    from laco_train.study.unlike import data_warnings, validation_warning

    problem = validation_warning(runs)
    if problem is not None and not config.force:
        raise InputError("compare", f"{problem} Leave some out, or add --force")
    arms = arms_of(runs)
    names = [arm.name for arm in arms]
    if config.reference != "original" and config.reference not in names:
        raise InputError("--reference", f"no run is named {config.reference!r}; there are {', '.join(names)}")

    from laco_train.study.page import markdown_table
    from laco_train.study.report import compare, exports, report_findings, report_tables, write_comparison
    from laco_train.study.speed import measure_speeds

    speeds = None
    if config.speed:
        with bar() as progress:
            task = progress.add_task("Measuring inference", total=None)
            speeds = measure_speeds(
                exports(arms),
                lambda done, of: progress.update(task, completed=done, total=of),
                trust_remote_code=config.trust_remote_code,
            )
    comparison = compare(
        arms,
        title="Comparison of runs",
        reference=config.reference,
        speeds=speeds,
        warnings=data_warnings(runs),
    )
    with bar() as progress:
        task = progress.add_task("Drawing", total=None)
        page = write_comparison(comparison, output, lambda done, of: progress.update(task, completed=done, total=of))
    print("\n".join([*report_findings(comparison), *comparison.notes, ""]))
    print("\n".join(markdown_table(report_tables(comparison)[0])))
    print(f"\nPage: {page}   curves: tensorboard --logdir {output / 'tensorboard'}", flush=True)
