"""Draw where the time of a request goes: by the latency profile, and as measured of the published plans."""

from __future__ import annotations

from optimizer.reports import formatting
from optimizer.reports.chart import COLOURS, Chart, Point, axis, bars, dots
from optimizer.reports.data import JobReport
from storage.records.measurements import ProfileRecord
from workers.runtime.plan import Action

RUN = Action.RUN.letter


def breakdown(report: JobReport) -> Chart | None:
    """Milliseconds of a request by action, dense and each published plan: by the profile, and as measured."""
    profile = report.profile
    if profile is None:
        return None
    plans = {"dense": RUN * len(profile.layer_seconds[RUN])} | {f"plan {p.id}": p.plan for p in report.plans}
    traces = []
    for letter in profile.layer_seconds:
        action = f"layers that {Action.of(letter).label}"
        taken = {name: 1000 * spent(profile, plan, letter) for name, plan in plans.items()}
        if any(taken.values()):
            points = [Point(ms, name, f"{name}: {ms:.1f} ms in {action}", plans[name]) for name, ms in taken.items()]
            traces.append(bars(action, points, COLOURS[letter], orientation="h"))
    rest = 1000 * outside_layers(profile)
    points = [Point(rest, name, f"{name}: {rest:.1f} ms outside the decoder layers") for name in plans]
    traces.append(bars("outside the layers", points, "--muted", orientation="h"))
    measured = [
        Point(
            1000 * plan.latency_seconds,
            f"plan {plan.id}",
            f"plan {plan.id}: measured {formatting.milliseconds(plan.latency_seconds)}, dense beside it "
            f"{formatting.milliseconds(plan.dense_latency_seconds)}",
            plan.plan,
        )
        for plan in report.plans
    ]
    traces.append(dots("measured", measured, "--text", 10, symbol="diamond-open", line={"width": 2}))
    layout = {
        "barmode": "stack",
        "xaxis": axis("milliseconds a request"),
        "yaxis": {"autorange": "reversed", "automargin": True, "showgrid": False},
    }
    description = "Milliseconds of a request by what the layers do, for dense and each published plan."
    return Chart("latency", tuple(traces), layout, 190 + 34 * len(plans), description)


def layers(profile: ProfileRecord) -> Chart:
    """Milliseconds of every layer under every action that was profiled."""
    traces = []
    for letter, seconds in profile.layer_seconds.items():
        action = Action.of(letter).label
        if any(seconds):
            points = [
                Point(layer, 1000 * each, f"layer {layer}, {action}: {1000 * each:.3f} ms")
                for layer, each in enumerate(seconds)
            ]
            traces.append(bars(action, points, COLOURS[letter]))
    layout = {
        "barmode": "group",
        "xaxis": axis("decoder layer", showgrid=False),
        "yaxis": axis("milliseconds", rangemode="tozero"),
        "showlegend": True,
    }
    description = "Milliseconds of every decoder layer under every action."
    return Chart("layers", tuple(traces), layout, 320, description, "Layer by layer")


def spent(profile: ProfileRecord, plan: str, letter: str) -> float:
    """Seconds that the plan's layers of one action take, by the profile."""
    seconds = profile.layer_seconds.get(letter, ())
    return sum(seconds[layer] for layer, own in enumerate(plan) if own == letter and layer < len(seconds))


def outside_layers(profile: ProfileRecord) -> float:
    """Seconds of a dense request that no layer accounts for: vision tower, embeddings, head, the loop around."""
    return max(0.0, profile.dense_latency_seconds - sum(profile.layer_seconds[RUN]))
