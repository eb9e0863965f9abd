"""Where the time of a request goes: the charts of the latency profile and of the published plans."""

from __future__ import annotations

from optimizer.reports import formatting
from optimizer.reports.data import JobReport
from optimizer.reports.figures import COLOURS, Chart, Trace
from storage.records.overview import JobProfile
from workers.runtime.plan import Action

RUN = Action.RUN.letter


def breakdown(report: JobReport) -> Chart | None:
    """Milliseconds of a request by action, dense and each published plan: by the profile, and as measured."""
    profile = report.profile
    if profile is None:
        return None
    plans = [("dense", RUN * len(profile.layer_seconds[RUN])), *((f"plan {p.id}", p.plan) for p in report.plans)]
    names = [name for name, _ in plans]
    traces: list[Trace] = [
        {
            "type": "bar",
            "orientation": "h",
            "name": f"layers that {Action.of(letter).label}",
            "y": names,
            "x": [1000 * spent(profile, plan, letter) for _, plan in plans],
            "customdata": [
                [
                    plan,
                    f"{name}: {1000 * spent(profile, plan, letter):.1f} ms in layers that {Action.of(letter).label}",
                ]
                for name, plan in plans
            ],
            "marker": {"color": COLOURS[letter]},
            "hoverinfo": "none",
        }
        for letter in profile.layer_seconds
        if any(letter in plan for _, plan in plans) and any(spent(profile, plan, letter) > 0 for _, plan in plans)
    ]
    rest = 1000 * outside_layers(profile)
    traces.append(
        {
            "type": "bar",
            "orientation": "h",
            "name": "outside the layers",
            "y": names,
            "x": [rest] * len(plans),
            "customdata": [["", f"{name}: {rest:.1f} ms outside the decoder layers"] for name in names],
            "marker": {"color": "--muted"},
            "hoverinfo": "none",
        }
    )
    traces.append(_measured(report))
    return Chart(
        "latency",
        tuple(traces),
        {
            "barmode": "stack",
            "xaxis": {"title": {"text": "milliseconds a request"}},
            "yaxis": {"autorange": "reversed", "automargin": True, "showgrid": False},
            "hovermode": "closest",
        },
        190 + 34 * len(plans),
        "Milliseconds of a request by what the layers do, for dense and each published plan.",
    )


def _measured(report: JobReport) -> Trace:
    plans = report.plans
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "measured",
        "y": [f"plan {plan.id}" for plan in plans],
        "x": [1000 * plan.seconds for plan in plans],
        "customdata": [
            [plan.plan, f"plan {plan.id}: measured {formatting.milliseconds(plan.seconds)}, dense beside it "
             f"{formatting.milliseconds(plan.dense_seconds)}"]
            for plan in plans
        ],
        "marker": {"color": "--text", "size": 10, "symbol": "diamond-open", "line": {"width": 2}},
        "hoverinfo": "none",
    }  # fmt: skip


def layers(profile: JobProfile) -> Chart:
    """Milliseconds of every layer under every action that was profiled."""
    return Chart(
        "layers",
        tuple(
            {
                "type": "bar",
                "name": Action.of(letter).label,
                "x": list(range(len(seconds))),
                "y": [1000 * each for each in seconds],
                "customdata": [
                    ["", f"layer {layer}, {Action.of(letter).label}: {1000 * each:.3f} ms"]
                    for layer, each in enumerate(seconds)
                ],
                "marker": {"color": COLOURS[letter]},
                "hoverinfo": "none",
            }
            for letter, seconds in profile.layer_seconds.items()
            if any(seconds)
        ),
        {
            "barmode": "group",
            "xaxis": {"title": {"text": "decoder layer"}, "showgrid": False},
            "yaxis": {"title": {"text": "milliseconds"}, "rangemode": "tozero"},
            "hovermode": "closest",
            "showlegend": True,
        },
        320,
        "Milliseconds of every decoder layer under every action.",
    )


def spent(profile: JobProfile, plan: str, letter: str) -> float:
    """Seconds that the plan's layers of one action take, by the profile."""
    seconds = profile.layer_seconds.get(letter, ())
    return sum(seconds[layer] for layer, own in enumerate(plan) if own == letter and layer < len(seconds))


def outside_layers(profile: JobProfile) -> float:
    """Seconds of a dense request that no layer accounts for: vision tower, embeddings, head, the loop around."""
    return max(0.0, profile.dense_seconds - sum(profile.layer_seconds[RUN]))
