"""Writing an export: the checks before, the format's own files, and what stands beside them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path

from optimizer.errors import UsageFault
from optimizer.exports import card, document, guards, maps
from optimizer.exports.document import Export, File, PlanDocument, describe
from optimizer.exports.interface import ExportFault, ExportFormat, Guide, Subject
from optimizer.exports.target import check_target, checksum, whole_directory
from optimizer.registries import EXPORT_FORMATS
from storage.database import Database
from storage.pareto import STANDALONE
from storage.queue import jobs
from storage.records import lookup
from storage.records.plans import LOSSLESS, Plan
from workers.errors import UnknownNameError
from workers.messages import Artifact, ModelSource
from workers.runtime import PlanError, SkipPlan

UNLISTED = frozenset({document.FILE_NAME, card.FILE_NAME})
"""Files without a checksum: the document itself, and the card, which a person may want to edit."""


@dataclass(frozen=True)
class Written:
    """A finished export, and what is to be said about the surroundings it is for."""

    directory: Path
    document: PlanDocument
    notes: tuple[str, ...]


def export_published(
    db: Database,
    plan: Plan,
    format_name: str,
    output: Path,
    *,
    model_path: str | None = None,
    force: bool = False,
    force_model: bool = False,
) -> Written:
    """Write a published plan with its fitted maps, if it has any. Raises UsageFault as ``export_plan`` does."""
    document = describe(plan, lookup.model(db, plan.model_id), lookup.task(db, plan.task_id))
    artifact = None
    if plan.artifact is not None and plan.artifact_checksum is not None:
        artifact = Artifact(plan.artifact, plan.artifact_checksum)
    source = model_source(db, plan, model_path)
    guard, forced = guards.artifact_of(plan), {"force": force, "force_model": force_model}
    return export_plan(document, source, format_name, output, **forced, artifact=artifact, guard=guard)


def model_source(db: Database, plan: Plan, model_path: str | None = None) -> ModelSource:
    """Return the model as the plan's job loaded it, or the one at ``model_path``."""
    # Of the specification the model alone: whatever else a job of another version says must not stand in the way.
    stored = {"path": plan.model} if plan.job_id is None else jobs.get(db, plan.job_id).spec["model"]
    known = {each.name: stored[each.name] for each in fields(ModelSource) if each.name in stored}
    source = ModelSource(**known | {"allow_pickle": tuple(stored.get("allow_pickle", ()))})
    return source if model_path is None else moved(source, model_path)


def moved(source: ModelSource, model_path: str) -> ModelSource:
    """Return the same source at another place: a local path or a hub id."""
    local = Path(model_path).expanduser()
    return replace(source, path=str(local.resolve()) if local.exists() else model_path, revision=None)


def export_plan(
    plan: PlanDocument,
    source: ModelSource,
    format_name: str,
    output: Path,
    *,
    force: bool = False,
    force_model: bool = False,
    artifact: Artifact | None = None,
    guard: Artifact | None = None,
) -> Written:
    """Write ``plan`` for the model at ``source`` to the directory ``output``.

    ``artifact`` names where the maps of a compensated plan lie, ``guard`` where its guard does.

    ``force`` replaces an existing directory in one step; ``force_model`` takes a model with another fingerprint than
    the plan's. Raises UsageFault for an unknown format, a plan that the format or the model cannot take, a model with
    another fingerprint, or a directory that exists.
    """
    chosen = find_format(format_name)
    require_takes(chosen, SkipPlan.parse(plan.plan), plan.compensation)
    check_target(output, force=force)
    content = maps.fetch(plan, artifact)
    guard_content = None if guard is None else guards.fetch(guard)
    notes = tuple(chosen.check())  # an engine that a variable names and that is not there ends it before it is written
    if plan.mode == LOSSLESS:
        notes += _lossless_note(chosen)
    if chosen.asks_guard and (unguarded := guards.require(plan, guard_content)):
        notes += (unguarded,)
    subject = _subject(plan, source, chosen, content, force_model=force_model)
    subject = replace(subject, guard=guard_content)
    with whole_directory(output, force=force) as directory:
        chosen.write(subject, directory)
        maps.write(content, directory)
        guards.write(guard_content, directory)
        _describe(subject, chosen, chosen.guide(subject, directory), directory)
    return Written(output, document.read(output), notes)


def _lossless_note(chosen: ExportFormat) -> tuple[str, ...]:
    """Say where a lossless plan, so written, answers alone."""
    if not chosen.needs_model or chosen.drafts >= {STANDALONE, LOSSLESS}:
        return ()
    if LOSSLESS in chosen.drafts:
        return (
            "the plan is a drafter: speculate_from drafts with what was written, as its README.md shows; loaded alone "
            "it answers otherwise than the dense model",
        )
    able = [each.name for each in EXPORT_FORMATS.values() if LOSSLESS in each.drafts]
    return (
        "the plan is a drafter: its figures hold where the dense model verifies its tokens, and what was written "
        f"answers alone; formats that draft are {', '.join(able)}",
    )


def _describe(subject: Subject, chosen: ExportFormat, guide: Guide, directory: Path) -> None:
    """Write the document and the card beside the format's files."""
    files = {
        path.relative_to(directory).as_posix(): File(size=path.stat().st_size, sha256=checksum(path))
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.relative_to(directory).as_posix() not in UNLISTED
    }
    export = Export(
        format=chosen.name,
        created_at=datetime.now(UTC),
        model_fingerprint=subject.fingerprint,
        versions=document.versions("skipplan", "torch", "transformers"),
        files=files,
    )
    complete = subject.document.model_copy(update={"export": export})
    (directory / document.FILE_NAME).write_text(complete.to_json(), encoding="utf-8")
    (directory / card.FILE_NAME).write_text(card.model_card(complete, chosen, guide), encoding="utf-8")


def _subject(
    plan: PlanDocument, source: ModelSource, chosen: ExportFormat, content: bytes | None, *, force_model: bool
) -> Subject:
    if not chosen.needs_model:
        return Subject(plan, source, checkpoint=None, fingerprint=None, loaded=None)
    directory, fingerprint = check_model(plan, source, force_model=force_model)
    from workers.models.loading import load_model
    from workers.runtime import describe, validate

    loaded = load_model(source, device="cpu")
    try:
        validate(SkipPlan.parse(plan.plan), describe(loaded.model))
    except PlanError as error:
        raise ExportFault(f"model {source.path} cannot take plan {plan.plan}: {error}") from None
    return Subject(plan, source, directory, fingerprint, loaded, maps.read(plan, content))


def check_model(plan: PlanDocument, source: ModelSource, *, force_model: bool) -> tuple[Path, str]:
    """Return the model's directory and fingerprint. Raises UsageFault where it is another model, unless forced."""
    from workers.errors import ModelError
    from workers.models.checkpoint import check_checkpoint, find_checkpoint, fingerprint_checkpoint

    try:
        directory = find_checkpoint(source)
        check_checkpoint(directory, source.allow_pickle)
        fingerprint = fingerprint_checkpoint(directory, source.allow_pickle, trust_remote_code=source.trust_remote_code)
    except ModelError as error:
        raise UsageFault(f"{error}; --model-path names where it is now") from None
    if fingerprint != plan.model.fingerprint and not force_model:
        raise ExportFault(
            f"model {source.path} is not the one that the plan was measured on: its fingerprint is {fingerprint[:12]}, "
            f"the plan's is {plan.model.fingerprint[:12]}; name the right one with --model-path, or take this one, "
            "unmeasured, with --force-model"
        )
    return directory, fingerprint


def find_format(name: str) -> ExportFormat:
    """Return the format of this name. Raises ExportFault naming those that are there."""
    try:
        found: ExportFormat = EXPORT_FORMATS[name]
    except UnknownNameError as error:
        raise ExportFault(f"--format: {error}") from None
    return found


def require_takes(chosen: ExportFormat, plan: SkipPlan, compensation: str) -> None:
    """Refuse a plan that the format cannot take. Raises ExportFault with the reason and the formats that can."""
    reason = chosen.refusal(plan, compensation)
    if reason is None:
        return
    able = [each.name for each in EXPORT_FORMATS.values() if each.refusal(plan, compensation) is None]
    raise ExportFault(
        f"--format: {chosen.name} cannot take plan {plan.text}: {reason}; formats that can: {', '.join(able)}"
    )
