"""``skipplan best``, ``plans`` and ``refit``: published plans, and the maps of one fitted again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from optimizer.cli import options
from optimizer.cli.options import global_options, open_database, print_either, print_json

if TYPE_CHECKING:
    from storage.records.plans import Plan


app = typer.Typer()

SortKey = Literal["speedup", "accuracy", "latency_seconds", "difference", "newest"]


def cautions(plan: Plan, changes: tuple[str, ...]) -> list[str]:
    """Warn of a plan that misses its constraint, of little confidence, of a useless dense model, and of changes."""
    from optimizer.job.result import dense_warning, meets_constraint
    from optimizer.job.sections import ConstraintSpec

    found = []
    if meets_constraint(plan) is False:
        found.append(
            f"plan {plan.id} does not meet the constraint of its job {plan.job_id}; --max-accuracy-drop sets a limit"
        )
    if plan.confidence < (usual := ConstraintSpec().confidence):
        found.append(
            f"plan {plan.id}: its intervals hold with a confidence of {plan.confidence:g}, "
            f"as its job asked, not {usual:g}"
        )
    if dense_warning(plan):
        found.append(f"plan {plan.id}: {dense_warning(plan)}")
    if changes:
        found.append(f"plan {plan.id} was measured before {', '.join(changes)} changed; its figures are of before")
    return found


@app.command()
def best(
    context: typer.Context,
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
    as_json: options.AsJson = False,
) -> int:
    """Show the fastest published plan of a model on a task within limits.

    [bold]Example:[/bold] skipplan best --model llava-12 --task easy-vqa --max-accuracy-drop 0.02
    """
    from optimizer.job.best import find_best
    from storage.records.plans import PlanQuery, mode_of

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
        found, changes = find_best(
            db, query, all_versions=all_versions, max_collateral_drop=max_collateral_drop, max_text_kl=max_text_kl
        )
    if as_json:
        from optimizer.job.result import plan_json

        print_json(plan_json(found, changes))
    else:
        from optimizer.cli.screen import Screen

        screen = Screen(quiet=False)
        screen.plans([found], [changes])
        for warning in cautions(found, changes):
            screen.warn(warning)
    return 0


@app.command("plans")
def list_plans(
    context: typer.Context,
    model: options.Model = None,
    task: options.Task = None,
    max_accuracy_drop: options.MaxDrop = None,
    min_speedup: options.MinSpeedup = None,
    device: options.Device = None,
    engine: options.Engine = None,
    concurrency: options.Concurrency = None,
    pareto: Annotated[bool, typer.Option("--pareto", help="Only members of the Pareto front.")] = False,
    sort: Annotated[SortKey, typer.Option(help="Order.")] = "speedup",
    limit: Annotated[int, typer.Option(min=1, help="Most plans to list.")] = 50,
    lossless: options.Lossless = False,
    all_versions: options.AllVersions = False,
    as_json: options.AsJson = False,
) -> int:
    """List published plans.

    [bold]Example:[/bold] skipplan plans --model llava-12 --pareto --sort accuracy
    """
    from optimizer.job.present import PresentVersions
    from optimizer.job.result import plan_json
    from storage.records import plans
    from storage.records.plans import PlanQuery, mode_of

    query = PlanQuery(
        model,
        task,
        device=device,
        engine=engine,
        concurrency=concurrency,
        mode=mode_of(lossless=lossless),
        max_accuracy_drop=max_accuracy_drop,
        min_speedup=min_speedup,
        on_front=pareto,
        sort=sort,
        limit=limit,
    )
    with open_database(context) as db:
        present = PresentVersions(db)
        found = plans.list_plans(db, present.resolve(query, all_versions=all_versions))
        changes = [present.changes(plan) for plan in found]
    if as_json:
        print_json([plan_json(*each) for each in zip(found, changes, strict=True)])
    else:
        from optimizer.cli.screen import Screen

        Screen(quiet=False).plans(found, changes)
    return 0


@app.command()
def refit(
    context: typer.Context,
    plan_id: Annotated[int, typer.Argument(metavar="PLAN", help="Id of a compensated plan.")],
    model_path: options.ModelPath = None,
    as_json: options.AsJson = False,
) -> int:
    """Fit a compensated plan's maps again, keep them, and check that they are bitwise identical.

    The exit code is 1 when they are not. [bold]Example:[/bold] skipplan refit 12
    """
    from optimizer.cli.screen import Screen
    from optimizer.errors import UsageFault
    from optimizer.exports.writing import moved
    from optimizer.job.inputs import model_source
    from optimizer.job.loading import read_spec
    from optimizer.stages import compensate
    from storage.queue import jobs
    from storage.records import plans

    with open_database(context) as db:
        plan = plans.get(db, plan_id)
        if plan.job_id is None:
            raise UsageFault(f"plan {plan_id} was imported: the job that its maps were fitted by is not known here")
        spec = read_spec(jobs.get(db, plan.job_id))
    source = None if model_path is None else moved(model_source(spec), model_path)
    with Screen(quiet=global_options(context).quiet, as_json=as_json).status(f"fitting the maps of plan {plan.id}"):
        found = compensate.refit(plan, spec, source)
    recorded = (plan.artifact_checksum or "none")[:12]
    verdict = "the same bits as recorded" if found.same else f"not the bits recorded ({recorded})"
    print_either(
        as_json,
        {"plan": plan.id, "artifact": found.artifact.location, "same": found.same},
        [
            f"maps of plan {plan.id} written to {found.artifact.location}",
            f"checksum {found.artifact.checksum[:12]}: {verdict}",
        ],
    )
    return 0 if found.same else 1
