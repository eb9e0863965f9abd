"""``skipplan best`` and ``plans``: ask the database for published plans."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optimizer.cli.state import open_database, print_json

if TYPE_CHECKING:
    from storage.database import Database
    from storage.records.plans import Plan


class SortKey(StrEnum):
    """What ``plans`` can be sorted by."""

    speedup = "speedup"
    accuracy = "accuracy"
    seconds = "seconds"
    drop = "drop"
    newest = "newest"


ModelOption = Annotated[str | None, typer.Option("--model", help="Name, path, hub id or fingerprint.")]
TaskOption = Annotated[str | None, typer.Option("--task", help="Name of the task.")]
MaxDrop = Annotated[
    float | None,
    typer.Option(
        "--max-accuracy-drop", min=0.0, max=1.0, help="Largest loss, as a share, by the upper end of its interval."
    ),
]
MinSpeedup = Annotated[float | None, typer.Option("--min-speedup", min=0.0, help="Smallest measured speed-up.")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="Device, or a part of its name.")]
MaxCollateralDrop = Annotated[
    float | None,
    typer.Option(
        "--max-collateral-drop",
        min=-1.0,
        max=1.0,
        help="Largest loss on other tasks, as a share; only plans that were measured on some.",
    ),
]
MaxTextKl = Annotated[
    float | None,
    typer.Option("--max-text-kl", min=0.0, help="Largest divergence on general text, in nats a token."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print as JSON.")]


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command()(best)
    app.command(name="plans")(list_plans)


def find_best(
    db: Database,
    model: str | None,
    task: str | None,
    max_accuracy_drop: float | None,
    min_speedup: float | None,
    device: str | None,
    max_collateral_drop: float | None = None,
    max_text_kl: float | None = None,
) -> Plan:
    """The plan to use. Raises UsageFault when model or task is not named, NoFeasiblePlan when none meets the limits."""
    from optimizer.errors import NoFeasiblePlan, UsageFault
    from storage.records import plans

    if model is None or task is None:
        raise UsageFault("name both --model and --task")
    limits: dict[str, Any] = {
        "max_accuracy_drop": max_accuracy_drop,
        "min_speedup": min_speedup,
        "device": device,
    }
    if max_collateral_drop is None and max_text_kl is None:
        found = plans.best(db, model, task, **limits)
    else:  # what is measured beside the task has no columns of its own
        fastest_first = plans.list_plans(db, model, task, sort="speedup", limit=None, **limits)
        within = (plan for plan in fastest_first if _within(plan, max_collateral_drop, max_text_kl))
        found = next(within, None)
    if found is None:
        raise NoFeasiblePlan(
            f"no published plan of {model} on {task} meets these limits; the dense model is the answer"
        )
    return found


def caution(plan: Plan) -> str | None:
    """What to know before a plan is used that its own job refused."""
    from optimizer.reports.data import meets_constraint

    if meets_constraint(plan) is not False:
        return None
    return f"plan {plan.id} does not meet the constraint of its job {plan.job_id}; --max-accuracy-drop sets a limit"


def _within(plan: Plan, max_collateral_drop: float | None, max_text_kl: float | None) -> bool:
    """Whether a plan was measured beside its task, and keeps to the limits there."""
    beside = plan.secondary.get("collateral") or {}
    drop, text = beside.get("largest_drop"), beside.get("text") or {}
    keeps_tasks = max_collateral_drop is None or (drop is not None and drop <= max_collateral_drop)
    keeps_text = max_text_kl is None or ("kl" in text and text["kl"] <= max_text_kl)
    return keeps_tasks and keeps_text


def best(
    context: typer.Context,
    model: ModelOption = None,
    task: TaskOption = None,
    max_accuracy_drop: MaxDrop = None,
    min_speedup: MinSpeedup = None,
    device: DeviceOption = None,
    max_collateral_drop: MaxCollateralDrop = None,
    max_text_kl: MaxTextKl = None,
    as_json: AsJson = False,
) -> int:
    """The fastest published plan of a model on a task within limits.

    [bold]Example:[/bold] skipplan best --model llava-12 --task easy-vqa --max-accuracy-drop 0.02
    """
    with open_database(context) as db:
        found = find_best(db, model, task, max_accuracy_drop, min_speedup, device, max_collateral_drop, max_text_kl)
    if as_json:
        from optimizer.job.result import plan_json

        print_json(plan_json(found))
    else:
        from optimizer.cli.screen import Screen

        screen = Screen(quiet=False)
        screen.plans([found])
        refused = caution(found)
        if refused:
            screen.warn(refused)
    return 0


def list_plans(
    context: typer.Context,
    model: ModelOption = None,
    task: TaskOption = None,
    max_accuracy_drop: MaxDrop = None,
    min_speedup: MinSpeedup = None,
    device: DeviceOption = None,
    pareto: Annotated[bool, typer.Option("--pareto", help="Only members of the Pareto front.")] = False,
    sort: Annotated[SortKey, typer.Option(help="Order.")] = SortKey.speedup,
    limit: Annotated[int, typer.Option(min=1, help="Most plans to list.")] = 50,
    as_json: AsJson = False,
) -> int:
    """List published plans.

    [bold]Example:[/bold] skipplan plans --model llava-12 --pareto --sort accuracy
    """
    from optimizer.job.result import plan_json
    from storage.records import plans

    with open_database(context) as db:
        found = plans.list_plans(
            db,
            model,
            task,
            max_accuracy_drop=max_accuracy_drop,
            min_speedup=min_speedup,
            device=device,
            on_front=pareto,
            sort=sort.value,
            limit=limit,
        )
    if as_json:
        print_json([plan_json(plan) for plan in found])
    else:
        from optimizer.cli.screen import Screen

        Screen(quiet=False).plans(found)
    return 0
