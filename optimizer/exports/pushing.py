"""Upload an export to a repository of the Hugging Face Hub, which then holds the export and nothing else."""

from __future__ import annotations

import glob
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from optimizer.errors import ClusterOrDatabaseFault, UsageFault
from optimizer.exports import card, document
from optimizer.exports.interface import ExportFault
from workers.text import one_line

if TYPE_CHECKING:
    from huggingface_hub import HfApi

TOKEN = "HF_TOKEN"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_OF_EVERY_REPOSITORY = frozenset({".gitattributes", card.FILE_NAME})


@dataclass(frozen=True)
class Push:
    """Describe an upload to a repository of the hub, done or planned."""

    repository: str
    files: dict[str, int]
    """Sizes in bytes by path."""
    commit: str | None
    """None where nothing was sent."""
    url: str


def check_repository(name: str) -> str:
    """Return the name of a repository. Raises ExportFault where it is not OWNER/NAME."""
    if not _REPOSITORY.fullmatch(name) or ".." in name or name.endswith((".git", ".", "-")):
        raise ExportFault(f"--push {name[:200]}: a repository of the hub is named OWNER/NAME")
    return name


def push(directory: Path, repository: str, *, private: bool = False, dry_run: bool = False) -> Push:
    """Upload the export in ``directory`` as one commit; files of an earlier export in the repository go.

    What the hub has already, also of an upload that was cut off, is not sent again. The token is that of the
    environment's HF_TOKEN. Raises UsageFault for a directory that is no export, a repository with files of others, or a
    public one where ``private`` was asked for, ClusterOrDatabaseFault where the hub does not answer or refuses.
    """
    check_repository(repository)
    read = document.read(directory)
    files = _files(directory)
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
    if dry_run:
        return Push(repository, files, None, f"{endpoint}/{repository}")
    token = os.environ.get(TOKEN, "").strip()
    if not token:
        raise ExportFault(f"{TOKEN} is not set; --push takes the hub's token from the environment alone")
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint, token=token)
    with _explained(repository, token):
        earlier = _prepare(api, repository, private=private)
        done = api.upload_folder(
            repo_id=repository,
            folder_path=directory,
            allow_patterns=list(files),
            delete_patterns=[glob.escape(path) for path in sorted(earlier - files.keys())],
            commit_message=f"Plan {read.plan} as {read.export.format if read.export else 'plan'}",
        )
    return Push(repository, files, done.oid, f"{endpoint}/{repository}")


def _files(directory: Path) -> dict[str, int]:
    """Return the sizes of all files of an export. Raises ExportFault for a link, which would lead out of it."""
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.is_symlink():
            raise ExportFault(f"{path}: is a link; an export has files alone")
        if path.is_file():
            found[path.relative_to(directory).as_posix()] = path.stat().st_size
    return found


def _prepare(api: HfApi, repository: str, *, private: bool) -> set[str]:
    """Make the repository where there is none, else return the files of its export. Raises ExportFault for others."""
    api.create_repo(repository, private=private, exist_ok=True)
    if private and api.repo_info(repository).private is False:
        raise ExportFault(f"--private: {repository} is there already and public; nothing was sent")
    there = set(api.list_repo_files(repository))
    earlier = _files_of_export(api, repository) if document.FILE_NAME in there else set()
    foreign = sorted(there - earlier - _OF_EVERY_REPOSITORY)
    if foreign:
        raise ExportFault(
            f"--push {repository}: holds files that are of no export of skipplan ({foreign[0]}, ...); nothing was "
            "sent; choose another name"
        )
    return there & earlier


def _files_of_export(api: HfApi, repository: str) -> set[str]:
    """Return the files that the ``skipplan.json`` of a repository lists, and itself."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(api.hf_hub_download(repository, document.FILE_NAME, local_dir=directory))
        try:
            export = document.read(file).export
        except UsageFault as fault:
            said = str(fault).replace(str(file), document.FILE_NAME)
            raise ExportFault(f"--push {repository}: {said}; nothing was sent; choose another name") from None
    return {document.FILE_NAME, *(export.files if export else ())}


@contextmanager
def _explained(repository: str, token: str) -> Iterator[None]:
    """Say in one line, without the token, what the hub refuses."""
    import httpx2
    from huggingface_hub import errors

    try:
        yield
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        reason = one_line(error.server_message or error).replace(token, "***")[:300]
        if status in (401, 403, 404):
            raise ExportFault(
                f"--push {repository}: the hub refuses it with status {status} ({reason}); {TOKEN} has to be a token "
                "that may write there"
            ) from None
        raise ClusterOrDatabaseFault(f"the hub answers with status {status} ({reason}); push again to go on") from None
    except (httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
        reason = one_line(error).replace(token, "***")[:300]
        raise ClusterOrDatabaseFault(f"the upload to {repository} failed ({reason}); push again to go on") from None
