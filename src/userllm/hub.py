"""Models on the Hugging Face hub: a folder goes up, a folder comes down; an unreachable hub costs seconds."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from userllm.errors import UserError
from userllm.language_models.pretrained import hub_problem, is_hub_id

_NAME = r"[A-Za-z0-9][\w.-]*"


def is_repo_id(name: str) -> bool:
    """Whether a name has the form of a hub id, OWNER/NAME."""
    return is_hub_id(name) and re.fullmatch(f"{_NAME}/{_NAME}", name) is not None


def upload(
    save: Callable[[Path], None],
    repo_id: str,
    *,
    revision: str | None,
    token: str | bool | None,
    private: bool | None,
    commit_message: str,
    create_pr: bool,
) -> str:
    """Put what ``save`` writes into a model repository, made where there is none; returns the address of the commit.

    Nothing is written before the hub has answered. Raises UserError, within seconds, where the id is none, the hub
    cannot be reached, or it refuses.
    """
    if not is_repo_id(repo_id):
        raise UserError(f"{repo_id!r} is not a hub id; give OWNER/NAME")
    if problem := hub_problem():
        raise UserError(f"{repo_id}: {problem}; nothing was uploaded, save_pretrained writes a folder here")
    api = huggingface_hub.HfApi(token=token)
    with _refusals(repo_id, revision), tempfile.TemporaryDirectory() as scratch:
        api.create_repo(repo_id, private=private, exist_ok=True)
        save(folder := Path(scratch) / "model")
        done = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
        )
    return str(done.pr_url or done.commit_url)


def download(repo_id: str, revision: str | None, token: str | bool | None) -> Path:
    """The folder of a model repository in the local hub cache, brought up to date where the hub can be reached.

    Raises UserError, within seconds, where it can not and the cache has no copy, or where the hub refuses.
    """
    problem = hub_problem()
    try:
        if problem:
            return Path(huggingface_hub.snapshot_download(repo_id, revision=revision, local_files_only=True))
        with _refusals(repo_id, revision):
            return Path(huggingface_hub.snapshot_download(repo_id, revision=revision, token=token))
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{repo_id}: no such folder, and as a model on the hub it is not in the local cache: "
            f"{problem or ' '.join(str(error).split())[:200]}"
        ) from error


@contextmanager
def _refusals(repo_id: str, revision: str | None) -> Iterator[None]:
    """The hub's refusals in one line each."""
    try:
        yield
    except GatedRepoError as error:
        raise UserError(
            f"{repo_id}: access is gated; accept its terms on {constants.ENDPOINT} and log in"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{repo_id}: no such folder, and not found on {constants.ENDPOINT}; check the id, or log in if private"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{repo_id}: the hub has no revision {revision!r} of it") from error
    except LocalEntryNotFoundError:
        raise
    except HfHubHTTPError as error:
        said = error.response.status_code
        hint = (
            "log in with `hf auth login` or give a token that may write there; " if said in (401, 403) else ""
        )
        raise UserError(
            f"{repo_id}: the hub answered {said}; {hint}{' '.join(str(error).split())[:200]}"
        ) from error
    except OSError as error:  # every connection failure of the hub's client
        raise UserError(
            f"{repo_id}: the transfer failed ({' '.join(str(error).split())[:200]}); run again"
        ) from error
