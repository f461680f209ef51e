"""`verify DIR`: whether an exported folder is still what was exported, by its manifest alone."""

from pathlib import Path

from laco_train.cli.parsing import VerbParser
from laco_train.errors import InputError
from laco_train.manifest import MANIFEST, faults, read_manifest, unlisted


def parser() -> VerbParser:
    """The verb's parser."""
    p = VerbParser(
        prog="laco_train verify",
        description=f"Check every file of an exported folder against the sums in its {MANIFEST}.",
        print_config=None,
    )
    p.add_argument("folder", type=str, help="Folder that laco_train exported.")
    return p


def run(args: list[str]) -> None:
    """Print a line for each file that is wrong, or that all is well.

    Raises:
        InputError: no manifest, or files that are missing or changed.
    """
    folder = Path(parser().parse_args(args).folder)
    manifest = read_manifest(folder, "verify")
    wrong = faults(folder, manifest)
    for name, problem in wrong.items():
        print(f"{name}: {problem}", flush=True)
    if wrong:
        problem = f"{len(wrong)} of {len(manifest.files)} files in {folder} are wrong; copy or export it again"
        raise InputError("verify", problem)
    size = sum(one.size for one in manifest.files.values())
    print(f"{folder} is whole: {len(manifest.files)} files, {size / 1e6:,.1f} MB, as they were exported.")
    if others := unlisted(folder, manifest):
        print(f"Not of the export: {', '.join(others[:5])}{' and more' if len(others) > 5 else ''}.")
