"""The assertion of contract tests, and measurements made up for them."""

from __future__ import annotations

from workers.messages import TOKEN_GROUPS
from workers.redundancy.kinds import ANSWER, INTERVENTIONS, OPERATORS, PARTS
from workers.redundancy.table import LayerMeasurement, LayerTable


def require(holds: bool, promise: str) -> None:
    """Raise AssertionError with the promise that is broken, also where Python runs without assertions."""
    if not holds:
        raise AssertionError(promise)


def made_up_table(layers: int) -> LayerTable:
    """Make a table of every kind of measurement but probes, larger at higher layers."""
    harms = (
        "withdrawal",
        "final_divergence",
        *(
            f"{name}@{each.label}"
            for name in ("layer_contribution", "trial_divergence")
            for each in (*INTERVENTIONS, *OPERATORS)
        ),
    )
    names = [(name, group) for name in harms for group in ("last", ANSWER)]
    names += [(name, ANSWER) for name in ("propagation_gain", "final_change", "final_distance")]
    names += [("vision_attention", "text"), ("vision_attention", "last")]
    for group in (*TOKEN_GROUPS, "last"):
        names += [(name, group) for name in ("cosine_distance", "relative_update", "cka", "propagation_gain")]
        names += [(name, group) for name in ("final_change", "final_distance")]
        names += [(f"operator_{name}@{part}", group) for name in ("distance", "angle", "share") for part in PARTS]
    for length in range(1, layers + 1):
        names += [(f"angular_distance@{length}", "last"), (f"linear_redundancy@{length}", "all")]
    rows = [
        LayerMeasurement(name, group, layer, 0.02 + 0.05 * layer, 0.01, 100)
        for name, group in names
        for layer in range(layers)
    ]
    return LayerTable(layers, tuple(rows))
