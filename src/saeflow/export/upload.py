"""An export that goes to Hugging Face, which happens where it is asked for by name and nowhere else."""

from pathlib import Path

from saeflow.config import ConfigError


def check_upload(repo: str, licence: str | None) -> None:
    """Raises `ConfigError` for what could not be uploaded, before anything is made: a name that is none, no licence,
    nobody logged in. Nothing is asked over the network."""
    from huggingface_hub import get_token
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"UPLOAD={repo} is no name of a repository, such as user/name: {error}") from error
    if "/" not in repo:
        raise ConfigError(f"UPLOAD={repo} lacks its owner: it must be user/name")
    if not licence:
        raise ConfigError(
            "an upload needs LICENSE=…, such as cc-by-4.0 or mit: without one nobody may use what is there"
        )
    if HF_HUB_OFFLINE:
        raise ConfigError("HF_HUB_OFFLINE is set: nothing can be uploaded until it is unset")
    if get_token() is None:
        raise ConfigError("nobody is logged in to Hugging Face here: run `hf auth login` once, or set HF_TOKEN")


def upload(folder: Path, repo: str, message: str) -> str:
    """Puts a finished export into the repository `repo` (user/name), as one commit; one that is not there yet is made,
    and is private until its owner changes that. Returns its address.

    Files of an earlier upload that the export no longer has stay. Raises `ConfigError` where the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    except (HfHubHTTPError, OSError) as error:
        raise ConfigError(f"{folder} is whole, but was not uploaded to {repo}: {error}") from error
    return f"https://huggingface.co/{repo}"
