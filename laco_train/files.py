"""Files that a kill or a full disk can't leave half written."""

import os
import stat
from pathlib import Path


def home(path: str | Path) -> Path:
    """`path`, a leading ``~`` read as the user's folder; as it stands where there is no such user."""
    return Path(os.path.expanduser(path))


def flush_folder(folder: Path) -> None:
    """Make names in `folder` survive a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_up(path: Path) -> None:
    """Give a file the permissions of other new ones: some libraries make theirs for its owner alone."""
    mask = os.umask(0o077)  # there is no way to ask without setting it
    os.umask(mask)
    path.chmod(stat.S_IMODE(path.stat().st_mode) | 0o666 & ~mask)


def write_whole(path: Path, text: str) -> None:
    """Write `text` beside `path`, flush it, then put it in its place.

    Raises:
        OSError: the disk is full, or not to be written to; what was at `path` stays.
    """
    aside = path.with_name(f"{path.name}.partial")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    flush_folder(path.parent)
