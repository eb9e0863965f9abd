"""The part of the API that exports: write a plan's export on the service's machine, list its files, download them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi import Path as PathParameter
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict, Field

from optimizer.dashboard.api import Db, PlanId
from optimizer.dashboard.control import WRITING, Submitter
from optimizer.dashboard.limits import Room
from optimizer.exports.document import FILE_NAME
from optimizer.registries import EXPORT_FORMATS
from storage.database import Database
from storage.records import plans
from workers.errors import UnknownNameError
from workers.text import one_line

router = APIRouter(prefix="/api/plans/{plan_id}/exports", tags=["exports"])

EXPORT_SECONDS = 3600
_writing = Room(working=1, waiting=4, seconds=20)
"""One export at a time: it loads the model."""

Format = Annotated[str, PathParameter(max_length=80, description="Name of the export format.")]


class ExportRequest(BaseModel):
    """An export to write."""

    model_config = ConfigDict(extra="forbid")

    format: str = Field(default="plan", max_length=80, description="Name of the export format, see docs/exports.md.")


class ExportedFile(BaseModel):
    """A file of an export."""

    path: str = Field(description="Relative to the export.")
    size: int = Field(description="Bytes.")


class Exported(BaseModel):
    """An export that can be downloaded."""

    plan: int
    format: str
    files: list[ExportedFile]
    notes: list[str] = Field(description="What is to be said about it; empty where it was written before.")


WRITTEN: dict[int | str, dict[str, Any]] = {200: {"model": Exported, "description": "It was written before."}}


@router.post("", status_code=201, responses=WRITING | WRITTEN)
def write_export(
    db: Db, caller: Submitter, request: Request, response: Response, plan_id: PlanId, body: ExportRequest
) -> Exported:
    """Write a published plan in a format, in a process of its own; one that is there already is kept."""
    directory = _place(db, request, plan_id, body.format)
    if not directory.exists():
        with _writing.take():
            if not directory.exists():  # it appears whole, once it is written
                notes = _export(db, plan_id, body.format, directory)
                return _listing(plan_id, body.format, directory, notes)
    response.status_code = 200
    return _listing(plan_id, body.format, directory, [])


@router.get("/{format_name}", responses=WRITING)
def list_export(db: Db, request: Request, plan_id: PlanId, format_name: Format) -> Exported:
    """List the files of an export that was written."""
    return _listing(plan_id, format_name, _written(db, request, plan_id, format_name), [])


@router.get("/{format_name}/files/{file:path}", response_class=FileResponse, responses=WRITING)
def download_file(
    db: Db,
    request: Request,
    plan_id: PlanId,
    format_name: Format,
    file: Annotated[str, PathParameter(max_length=1000, description="Path as the listing gives it.")],
) -> FileResponse:
    """Download one file of an export."""
    directory = _written(db, request, plan_id, format_name)
    if file not in _files(directory):  # nothing else is looked at, so no path leads out
        raise HTTPException(404, "the export has no such file")
    return FileResponse(directory / file, media_type="application/octet-stream", filename=Path(file).name)


def _place(db: Database, request: Request, plan_id: int, format_name: str) -> Path:
    """Return where a plan's export lies. Raises NotFound, or HTTPException for an unknown format."""
    plan = plans.get(db, plan_id)
    try:
        name = EXPORT_FORMATS.check(format_name)
    except UnknownNameError as error:
        raise HTTPException(404, f"format: {one_line(error)[:500]}") from None
    exports: Path = request.app.state.exports
    return exports / f"plan-{plan.id}-{name}"


def _written(db: Database, request: Request, plan_id: int, format_name: str) -> Path:
    directory = _place(db, request, plan_id, format_name)
    if not directory.is_dir():
        raise HTTPException(404, f"plan {plan_id} was not exported as {format_name}; POST to its exports first")
    return directory


def _files(directory: Path) -> dict[str, int]:
    """Return the files of an export by their relative paths, with their sizes; no links."""
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and not path.is_symlink():
            found[path.relative_to(directory).as_posix()] = path.stat().st_size
    return found


def _listing(plan_id: int, format_name: str, directory: Path, notes: list[str]) -> Exported:
    files = [ExportedFile(path=path, size=size) for path, size in _files(directory).items()]
    return Exported(plan=plan_id, format=format_name, files=files, notes=notes)


def _export(db: Database, plan_id: int, format_name: str, directory: Path) -> list[str]:
    """Run the command, so that a model too large for the memory ends a process, not the service."""
    command = [sys.executable, "-m", "optimizer.cli.main", "--quiet", "export", str(plan_id), "--json"]
    command += ["--format", format_name, "--output", str(directory)]
    url = db.engine.url.render_as_string(hide_password=False)
    try:
        done = subprocess.run(
            command, env={**os.environ, "SKIPPLAN_DATABASE": url}, stdin=subprocess.DEVNULL, capture_output=True,
            text=True, timeout=EXPORT_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise HTTPException(503, f"the export took longer than {EXPORT_SECONDS} s") from None
    if done.returncode != 0 or not (directory / FILE_NAME).is_file():
        reason = one_line(done.stderr.strip().removeprefix("skipplan: "))[:1000]
        raise HTTPException(400, f"plan {plan_id} cannot be exported as {format_name}: {reason}")
    notes: list[str] = json.loads(done.stdout)["notes"]
    return notes
