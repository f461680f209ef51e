"""The program: picks the verb, and turns expected failures and interrupts into one line and an exit code.

Nothing heavy is imported before the verb needs it, so that `--help` answers at once.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Timer

from laco_train.errors import InputError, TrainingStopped

_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")  # torchrun's, Lightning's, srun's
_USAGE = """\
usage: python -m laco_train VERB [options]

Collapse decoder layers of a causal language model (Layer Collapse, arXiv 2402.11187), train what is left, export it.

verbs:
  fit       collapse, train, export:       fit --recipe RECIPE [--resume auto [--run DIR]] [--SECTION.KEY VALUE ...]
  validate  validation loss:               validate --recipe RECIPE [--ckpt_path FILE]
  collapse  search and write, no training: collapse --recipe RECIPE --output DIR
  analyze   compare layers, sweep:         analyze --recipe RECIPE --output DIR [--sweep true]
  export    a model from a checkpoint:     export --checkpoint FILE --output DIR [--format hf]
  verify    an export against its sums:    verify DIR
  study     arms under one budget:         study --recipe RECIPE [--arms laco,sleb]
  compare   runs that exist:               compare RUN_OR_EXPORT ... [--output DIR] [--reference NAME]
  evaluate  tasks, perplexity, samples:    evaluate --model DIR --tasks T1,T2 [--baseline DIR]
  bench-inference  speed and memory:       bench-inference MODEL ... [--batch-sizes 1,4,16]

RECIPE is a path, a name under ./recipes, or the name of a recipe that the package ships.
`VERB --help` explains every key; `VERB --recipe RECIPE --print_config` prints a recipe with its comments."""


def main(argv: Sequence[str]) -> int:
    """Run the program; returns the exit code: 0, 1 if training stopped, 2 for bad input, 130 if interrupted.

    Raises:
        SystemExit: 128 and the number of the signal that ended a fit, once its checkpoint was saved.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE)
        return 0
    if argv[0] == "--version":
        from laco_train import __version__

        print(f"laco_train {__version__}")
        return 0
    verb = _verbs().get(argv[0])
    try:
        if verb is None:
            raise InputError(argv[0], f"is no verb; the verbs are {', '.join(_verbs())}")
        with _interrupts_come_through():
            verb(list(argv[1:]))
    except InputError as error:
        print(f"laco_train: error: {error}", file=sys.stderr)
        return 2
    except TrainingStopped as error:
        print(f"laco_train: stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("laco_train: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


@contextmanager
def _interrupts_come_through() -> Iterator[None]:
    """Let an interrupt end rank 0, which ends the other ranks; they ignore it.

    It is sent again where Python drops it: in a destructor, of which loading runs many.
    """
    if next(filter(None, map(os.environ.get, _RANKS)), "0") != "0":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    others = sys.unraisablehook

    def hook(dropped: "sys.UnraisableHookArgs") -> None:
        if dropped.exc_type is KeyboardInterrupt:
            Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()
        else:
            others(dropped)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = others


def _verbs() -> dict[str, Callable[[list[str]], None]]:
    return {
        "fit": _fit,
        "validate": _validate,
        "collapse": _collapse,
        "analyze": _analyze,
        "export": _export,
        "verify": _verify,
        "study": _study,
        "compare": _compare,
        "evaluate": _evaluate,
        "bench-inference": _bench_inference,
    }


def _fit(args: list[str]) -> None:
    from laco_train.cli.rounds import run

    run(args)


def _validate(args: list[str]) -> None:
    from laco_train.cli.trainer import run

    run("validate", args)


def _collapse(args: list[str]) -> None:
    from laco_train.cli.collapse import run

    run(args)


def _analyze(args: list[str]) -> None:
    from laco_train.cli.analyze import run

    run(args)


def _export(args: list[str]) -> None:
    from laco_train.cli.export import run

    run(args)


def _verify(args: list[str]) -> None:
    from laco_train.cli.verify import run

    run(args)


def _study(args: list[str]) -> None:
    from laco_train.cli.study import run

    run(args)


def _compare(args: list[str]) -> None:
    from laco_train.cli.compare import run

    run(args)


def _evaluate(args: list[str]) -> None:
    from laco_train.cli.evaluate import run

    run(args)


def _bench_inference(args: list[str]) -> None:
    from laco_train.cli.bench_inference import run

    run(args)
