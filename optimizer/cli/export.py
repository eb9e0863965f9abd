"""``skipplan export``, ``push``, ``verify-export``, ``import`` and ``export-study``: out of the database, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optimizer.cli import options
from optimizer.cli.options import global_options, open_database, print_either
from optimizer.cli.plans import cautions
from optimizer.registries import EXPORT_FORMATS

if TYPE_CHECKING:
    from optimizer.exports.engine_verification import EngineVerification
    from optimizer.exports.verification import Verification
    from storage.records.plans import MeasuredFigures

app = typer.Typer()

Private = Annotated[bool, typer.Option("--private", help="Make the repository private; refuse a public one.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Upload nothing, list what would go.")]
FormatName = Annotated[str, typer.Option("--format", metavar="|".join(EXPORT_FORMATS), help="What to write.")]


@app.command()
def export(
    context: typer.Context,
    output: Annotated[Path, typer.Option("--output", help="Directory to write.", show_default=False)],
    plan_id: Annotated[int | None, typer.Argument(metavar="[PLAN]", help="Id; or pick one as `best` does.")] = None,
    format_name: FormatName = "checkpoint",
    model: options.Model = None,
    task: options.Task = None,
    max_accuracy_drop: options.MaxDrop = None,
    min_speedup: options.MinSpeedup = None,
    device: options.Device = None,
    engine: options.Engine = None,
    concurrency: options.Concurrency = None,
    max_collateral_drop: options.MaxCollateralDrop = None,
    max_text_kl: options.MaxTextKl = None,
    lossless: options.Lossless = False,
    all_versions: options.AllVersions = False,
    model_path: options.ModelPath = None,
    force: options.Force = False,
    force_model: options.ForceModel = False,
    push: Annotated[
        str | None, typer.Option("--push", metavar="OWNER/NAME", help="Upload it to this repository of the hub.")
    ] = None,
    private: Private = False,
    dry_run: DryRun = False,
    as_json: options.AsJson = False,
) -> int:
    """Write a plan for another deployment: as JSON, as a plain Hugging Face checkpoint, or for another runtime.

    --push uploads what was written as one commit, with the token in HF_TOKEN; `skipplan push` does so later.

    [bold]Examples:[/bold]

    skipplan export 7 --output exports/fast

    skipplan export --model llava-12 --task easy-vqa --max-accuracy-drop 0.01 --output exports/fast
    """
    from optimizer.cli.screen import Screen, figures
    from optimizer.errors import UsageFault
    from optimizer.exports.pushing import check_repository
    from optimizer.exports.writing import export_published
    from optimizer.job.best import find_best
    from optimizer.job.present import PresentVersions
    from storage.records import plans
    from storage.records.plans import PlanQuery, mode_of

    if push is None and (private or dry_run):
        raise UsageFault("--private and --dry-run belong to --push")
    if push is not None:
        check_repository(push)
    query = PlanQuery(
        model,
        task,
        device=device,
        engine=engine,
        concurrency=concurrency,
        mode=mode_of(lossless=lossless),
        max_accuracy_drop=max_accuracy_drop,
        min_speedup=min_speedup,
    )
    with open_database(context) as db:
        if plan_id is None:
            plan, changes = find_best(
                db, query, all_versions=all_versions, max_collateral_drop=max_collateral_drop, max_text_kl=max_text_kl
            )
        else:
            plan = plans.get(db, plan_id)
            changes = PresentVersions(db).changes(plan)
        screen = Screen(quiet=global_options(context).quiet, as_json=as_json)
        with screen.status(f"writing plan {plan.id} as {format_name}"):
            written = export_published(
                db, plan, format_name, output, model_path=model_path, force=force, force_model=force_model
            )
    pushed = None
    if push is not None:
        pushed = _push(context, output, push, private=private, dry_run=dry_run, as_json=as_json)
    notes = [*cautions(plan, changes), *written.notes]
    print_either(
        as_json,
        {"plan": plan.id, "format": format_name, "output": str(output), "notes": notes, "push": pushed},
        [
            f"plan {plan.id} ({plan.plan}) written to {output}: {figures(plan)}",
            *(f"note: {note}" for note in notes),
            *(_push_lines(pushed) if pushed else ()),
        ],
    )
    return 0


@app.command("push")
def upload(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What `export` wrote.")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository of the hub.")],
    private: Private = False,
    dry_run: DryRun = False,
    as_json: options.AsJson = False,
) -> int:
    """Upload an export to the hub as one commit; an upload that was cut off goes on. The token is that of HF_TOKEN.

    [bold]Example:[/bold] skipplan push exports/fast my-team/fast --dry-run
    """
    pushed = _push(context, directory, repository, private=private, dry_run=dry_run, as_json=as_json)
    print_either(as_json, pushed, _push_lines(pushed))
    return 0


def _push(
    context: typer.Context, directory: Path, repository: str, *, private: bool, dry_run: bool, as_json: bool
) -> dict[str, Any]:
    from dataclasses import asdict

    from optimizer.cli.screen import Screen
    from optimizer.exports.pushing import push

    screen = Screen(quiet=global_options(context).quiet, as_json=as_json)
    with screen.status(f"uploading {directory} to {repository}"):
        return asdict(push(directory, repository, private=private, dry_run=dry_run))


def _push_lines(pushed: dict[str, Any]) -> list[str]:
    size = sum(pushed["files"].values())
    if pushed["commit"] is None:
        files = [f"{size:>15,}  {path}" for path, size in pushed["files"].items()]
        return [*files, f"{size:,} bytes in {len(files)} files would go to {pushed['url']}"]
    return [f"{size:,} bytes in {len(pushed['files'])} files are at {pushed['url']} (commit {pushed['commit'][:12]})"]


@app.command("import")
def take(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A skipplan.json, or the directory of an export.")],
    as_json: options.AsJson = False,
) -> int:
    """Take a plan over from another database; its figures are marked as imported.

    [bold]Example:[/bold] skipplan import exports/fast/skipplan.json
    """
    from optimizer.exports import document
    from optimizer.exports.importing import import_plan
    from optimizer.job.result import plan_json

    read = document.read(file)  # before a database is created for nothing
    with open_database(context, create=True) as db:
        plan = import_plan(db, read, file)
    print_either(as_json, plan_json(plan), [f"plan {plan.id} ({plan.plan}) of {plan.model} on {plan.task} imported"])
    return 0


@app.command("verify-export")
def verify(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What `export` wrote.")],
    task: Annotated[str | None, typer.Option("--task", help="Task file, if the task is not bundled.")] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples", min=1, help="How many held-out samples to run; 8, in an engine 200.", show_default=False
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option("--engine", help="Engine that serves the export; the format's own, where it is here."),
    ] = None,
    python: Annotated[str | None, typer.Option("--python", help="Interpreter that loads the export.")] = None,
    model_path: options.ModelPath = None,
    force_model: options.ForceModel = False,
    as_json: options.AsJson = False,
) -> int:
    """Load an export in a fresh process, or serve it in its engine, and compare its answers with the live model's.

    The exit code is 1 when they differ. [bold]Example:[/bold] skipplan verify-export exports/fast
    """
    from dataclasses import asdict

    from optimizer.cli.screen import Screen
    from optimizer.exports import document
    from optimizer.exports.verification import Verification, verify_export
    from optimizer.exports.writing import moved
    from workers.messages import ModelSource

    read = document.read(directory)
    source = ModelSource(read.model.name)
    if model_path is not None:
        source = moved(source, model_path)
    screen = Screen(quiet=global_options(context).quiet, as_json=as_json)
    with screen.status("loading the export where it is to run, and the live model"):
        found = verify_export(
            directory, source, task=task, samples=samples, python=python, engine=engine, force_model=force_model
        )
    lines = _lines(found) if isinstance(found, Verification) else _engine_lines(found, read.figures)
    print_either(as_json, asdict(found) | {"passed": found.passed}, lines)
    return 0 if found.passed else 1


def _lines(found: Verification) -> list[str]:
    lines = [f"{found.files} files are as they were written"]
    if found.loaded:
        where = ", ".join(f"{name} {version}" for name, version in found.versions.items())
        same = len(found.answers) - len(found.differing)
        lines += [
            f"loaded as {found.model_class} by {where}, without this project",
            f"{same} of {len(found.answers)} answers equal; logits differ by at most "
            f"{found.largest_logit_difference:.2e} of the largest (allowed {found.tolerance:.0e})",
        ]
        lines += [
            f"{sample}: live {pair[0]!r}, export {pair[1]!r}"
            for sample, pair in found.answers.items()
            if sample in found.differing
        ]
    else:
        lines.append(f"format {found.format} holds no model to load")
    return [*lines, *(f"note: {note}" for note in found.notes), "passed" if found.passed else "FAILED"]


def _engine_lines(found: EngineVerification, published: MeasuredFigures) -> list[str]:
    from optimizer.exports.engine_verification import Accuracy

    where = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    equal, tied = found.having("equal"), found.having("near tie")
    accuracies = {
        f"in {found.engine}": found.accuracy,
        "of the live model": found.live_accuracy,
    }
    if found.drafts is None:  # the plan's own accuracy, which is not that of a dense model with a drafter
        own = Accuracy(published.accuracy, published.accuracy_low, published.accuracy_high)
        accuracies["published"] = own
    return [
        f"{found.files} files are as they were written",
        f"served by {found.engine} {found.version}" + (f" ({where})" if where else ""),
        *_draft_lines(found),
        f"{len(equal)} of {len(found.answers)} answers equal, {len(tied)} others by near ties; log-probabilities "
        f"differ by at most {found.largest_logprob_difference:.1e} of the largest logit (of {found.tolerance:.0e})",
        *(
            f"accuracy {name}: {each.value:.4f} ({each.low:.4f} to {each.high:.4f})"
            for name, each in accuracies.items()
        ),
        *(
            f"{sample}: live {answer.live!r}, {found.engine} {answer.served!r}: {answer.outcome}, {answer.detail}"
            for sample, answer in found.answers.items()
            if answer.outcome != "equal"
        ),
        "passed" if found.passed else "FAILED",
    ]


def _draft_lines(found: EngineVerification) -> list[str]:
    counts = found.drafts
    if counts is None or not counts.drafts:
        return []
    return [
        f"{counts.accepted} of {counts.drafted} drafted tokens kept, "
        f"{1 + counts.accepted / counts.drafts:.2f} tokens a round"
    ]


@app.command("export-study")
def export_study(
    context: typer.Context,
    job: options.JobNumber,
    storage: Annotated[
        str, typer.Option(metavar="URL", help="Optuna storage, for example sqlite:///study.db.", show_default=False)
    ],
    name: Annotated[str | None, typer.Option(help="Name of the study; by default the job's number.")] = None,
    as_json: options.AsJson = False,
) -> int:
    """Write a job's search as an Optuna study.

    [bold]Example:[/bold] skipplan export-study 3 --storage sqlite:///study.db; optuna-dashboard sqlite:///study.db
    """
    from dataclasses import asdict

    from optimizer.exports.optuna_study import export_study as write

    with open_database(context) as db:
        written = write(db, job, storage, name)
    print_either(
        as_json,
        asdict(written),
        [f"study {written.name!r}: {written.trials} trials, {written.complete} of them complete"],
    )
    return 0
