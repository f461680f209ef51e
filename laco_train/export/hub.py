"""An exported folder on the Hugging Face Hub, only where the user asks for it."""

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from laco_train.errors import InputError, TrainingStopped

KEY = "--push-to-hub"


def check_push(repo: str, *, dry_run: bool) -> None:
    """InputError if `repo` can't be the id of a repository, or there is no token to write to it with."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(KEY, f"{repo!r} is no id such as you/model-name: {error}") from error
    if not dry_run and get_token() is None:
        raise InputError(KEY, "there is no token of the Hub; run `hf auth login` or set HF_TOKEN, or add --dry-run")


def planned_push(folder: Path, repo: str) -> list[str]:
    """What `push` would do, in lines: each file with its size, then the model card."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    total = sum(path.stat().st_size for path in files)
    sizes = [f"  {path.stat().st_size:>15,} bytes  {path.relative_to(folder)}" for path in files]
    card = [f"  {line}".rstrip() for line in (folder / "README.md").read_text(encoding="utf-8").splitlines()]
    head = f"Dry run, nothing is sent. {repo} would get {len(files)} files, {total / 1e6:,.1f} MB:"
    return [head, *sizes, "Its model card:", *card]


def push(folder: Path, repo: str, endpoint: str | None = None) -> str:
    """Upload `folder` as one commit; a repository that is made for it is private.

    Args:
        folder: an export.
        repo: id of the repository.
        endpoint: of the Hub; None: as huggingface_hub has it.

    Returns:
        Address of the repository.

    Raises:
        TrainingStopped: the Hub refused, or can't be reached; the folder stays as it is.
    """
    api = HfApi(endpoint=endpoint)
    try:
        address = api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Export of laco_train")
    except (HfHubHTTPError, HTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise TrainingStopped(f"{repo} was not uploaded, {folder} is complete all the same: {reason}") from error
    return str(address)
