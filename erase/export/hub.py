"""The Hugging Face hub: is somebody logged in, and upload."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from erase.prompts.errors import ErasureError, reason


def hub_login(repo: str) -> str:
    """The name under which this machine is logged in to the hub, to be asked before long work.

    Raises:
        ErasureError: not logged in, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    with _hub_errors(
        f"cannot push to {repo}", "log in with `hf auth login`, or leave --push_to_hub out"
    ):
        return str(HfApi().whoami()["name"])


def push_to_hub(folder: str | Path, repo: str, private: bool = True) -> str:
    """Upload an exported folder to the Hugging Face hub and return its address.

    Args:
        folder: what an export wrote; it stays.
        repo: user/name; made if it does not exist. One that exists keeps its visibility.
        private: whether a new repository is private.

    Raises:
        ErasureError: not logged in, not reachable, or refused.
    """
    from huggingface_hub import HfApi

    with _hub_errors(
        f"{folder} is whole, but could not be pushed to {repo}",
        f"try again with `hf upload {repo} {folder}`",
    ):
        HfApi().create_repo(repo, private=private, exist_ok=True)
        return str(
            HfApi()
            .upload_folder(repo_id=repo, folder_path=folder, commit_message="Erased weights")
            .repo_url
        )


@contextmanager
def _hub_errors(what: str, way_out: str) -> Iterator[None]:
    try:
        yield
    except (
        Exception
    ) as error:  # the client, its HTTP library and the system each raise their own kinds
        raise ErasureError(f"{what}: {reason(error)}; {way_out}") from error
