"""Criteria on tables small enough to check by hand, and how they are found."""

from __future__ import annotations

import math
from importlib.metadata import EntryPoint

import pytest

from optimizer import criteria
from optimizer.criteria import Risk
from optimizer.errors import UsageFault
from optimizer.job.spec import JobSpec
from optimizer.registries import CRITERIA
from workers.errors import MeasurementError
from workers.redundancy.table import LayerMeasurement, LayerTable


def table(layers: int = 3, **columns: list[float | None]) -> LayerTable:
    """Columns are named ``name__group``, with ``_at_`` for the at sign and ``_`` for the point after it."""
    rows = []
    for column, values in columns.items():
        name, _, group = column.partition("__")
        name = name.replace("_at_", "@")
        rows += [
            LayerMeasurement(name, group, layer, value, None, 9)
            for layer, value in enumerate(values)
            if value is not None
        ]
    return LayerTable(layers, tuple(rows))


DISTANCES = table(
    cosine_distance__vision=[0.1, 0.5, 0.2], cosine_distance__text=[0.4, 0.1, 0.3], cosine_distance__all=[0.2, 0.4, 0.3]
)


def test_cosine_needs_both_groups_for_skip_and_vision_alone_for_freeze() -> None:
    risk = criteria.load("cosine").risk(DISTANCES)
    assert risk.risk["F"] == (0.1, 0.5, 0.2)
    assert risk.risk["S"] == risk.risk["B"] == (0.4, 0.5, 0.3)
    assert risk.order("F") == (0, 2, 1) and risk.order("S") == (2, 0, 1)
    assert risk.of(1, "F") == 0.5 and risk.of(1, "R") == 0.0


def test_block_influence_is_the_distance_of_all_tokens_whatever_the_action() -> None:
    risk = criteria.load("block-influence").risk(DISTANCES)
    assert set(risk.risk.values()) == {(0.2, 0.4, 0.3)}


def test_angular_takes_the_best_block_that_holds_a_layer() -> None:
    angles = table(angular_distance_at_1__last=[0.3, 0.1, 0.2], angular_distance_at_2__last=[0.4, 0.15, None])
    assert criteria.load("angular").risk(angles).risk["S"] == (0.3, 0.1, 0.2)
    pairs = criteria.load("angular", {"block": 2})
    assert pairs.risk(angles).risk["S"] == pytest.approx((0.4, 0.15, 0.15))
    assert list(pairs.best_block(angles, 2)) == [1, 2]  # type: ignore[attr-defined]


def test_contributions_are_what_they_are_and_infinite_where_refused() -> None:
    measured = table(
        layer_contribution_at_freeze__last=[0.1, 0.2, 0.0],
        layer_contribution_at_bypass__last=[0.3, 0.2, 0.1],
        layer_contribution_at_skip__last=[None, 0.2, 0.4],
    )
    risk = criteria.load("layer-contribution").risk(measured)
    assert risk.risk["S"] == (math.inf, 0.2, 0.4) and risk.order("S") == (1, 2, 0)
    assert risk.risk["F"] == (0.1, 0.2, 0.0)


def test_withdrawal_is_over_eta() -> None:
    divergences = table(withdrawal__last=[0.6, 0.003, 0.0003])
    assert criteria.load("vtw").risk(divergences).risk["B"] == pytest.approx((200, 1, 0.1))
    assert criteria.load("vtw", {"eta": 0.3}).risk(divergences).risk["B"] == pytest.approx((2, 0.01, 0.001))


def test_position_alone() -> None:
    assert criteria.load("late-entry").risk(table()).order("B") == (0, 1, 2)
    assert criteria.load("early-exit").risk(table()).order("B") == (2, 1, 0)


@pytest.mark.parametrize("name", [name for name in CRITERIA.built_in if "entry" not in name and "exit" not in name])
def test_what_was_not_measured_is_named(name: str) -> None:
    with pytest.raises(MeasurementError, match="was not measured"):
        criteria.load(name).risk(table())


def test_a_risk_is_no_negative_and_no_nan() -> None:
    for value in (-0.1, math.nan):
        with pytest.raises(ValueError, match="criterion c"):
            Risk("c", {"S": (0.0, value)})


# Names and thresholds ---------------------------------------------------------------------------------------------


def test_every_built_in_criterion_loads_and_says_whose_it_is() -> None:
    for name in CRITERIA.built_in:
        loaded = criteria.load(name)
        assert loaded.name == name and loaded.source and set(loaded.published_for) <= set("FBS")
        # What this project made itself is no published method.
        ours = ("skip-it", "skip-it-static", "skip-it-causal", "calibrated", "linear-redundancy")
        assert bool(loaded.published_for) == (name not in ours)


@pytest.mark.parametrize(
    ("name", "thresholds", "message"),
    [
        ("nope", {}, "'nope' is unknown; choose one of skip-it"),
        ("vtw", {"etta": 1}, "criterion vtw takes eta, not etta"),
        ("cosine", {"eta": 1}, "criterion cosine takes none, not eta"),
        ("vtw", {"eta": 0}, "eta must be above 0"),
        ("angular", {"block": 1.5}, "whole number"),
        ("skip-it", {"bypass": -1}, "bypass must be above 0"),
    ],
)
def test_wrong_names_and_thresholds_are_named(name: str, thresholds: dict[str, float], message: str) -> None:
    with pytest.raises(UsageFault, match=message):
        criteria.load(name, thresholds)
    with pytest.raises(ValueError, match=message):
        JobSpec.model_validate({"model": {"path": "m"}, "task": "t", "criterion": name, "thresholds": thresholds})


def test_thresholds_are_recorded_with_the_job_even_where_not_given() -> None:
    job = JobSpec.model_validate({"model": {"path": "m"}, "task": "t", "criterion": "vtw"})
    assert job.thresholds == {"eta": 0.003} == job.canonical()["thresholds"]
    again = JobSpec.model_validate(job.model_dump(mode="json"))
    assert again == job and again.digest() == job.digest()


class Mine:
    name, source, needs, published_for = "mine", "a test", (), "S"

    def __init__(self, sharpness: float = 2.0) -> None:
        self.thresholds = {"sharpness": sharpness}

    def risk(self, measured: LayerTable) -> Risk:
        return Risk(self.name, dict.fromkeys("FBS", (0.5,) * measured.num_layers))


def test_a_users_own_criterion_is_found_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint("mine", f"{__name__}:Mine", CRITERIA.group),
        EntryPoint("lost", "no.such:Thing", CRITERIA.group),
    ]

    def entry_points(group: str, name: str | None = None) -> list[EntryPoint]:
        assert group == "skipplan.criteria"
        return [point for point in points if name in (None, point.name)]

    monkeypatch.setattr("workers.registry.entry_points", entry_points)
    monkeypatch.setattr(CRITERIA, "_found", {})
    assert criteria.load("mine", {"sharpness": 3}).thresholds == {"sharpness": 3}
    assert tuple(CRITERIA)[-2:] == ("lost", "mine")
    with pytest.raises(UsageFault, match=r"'lost' cannot be imported from no\.such:Thing"):
        criteria.load("lost")
    points.append(points[0])
    CRITERIA._found.clear()
    with pytest.raises(UsageFault, match="several packages"):
        criteria.load("mine")


# Our own ----------------------------------------------------------------------------------------------------------

MEASURED: dict[str, list[float | None]] = {
    "cosine_distance__vision": [0.1, 0.02, 0.3],
    "cosine_distance__text": [0.5, 0.1, 0.1],
    "vision_attention__text": [0.4, 0.2, 0.1],
    "angular_distance_at_1__last": [0.4, 0.1, 0.2],
    "final_change__last": [0.9, 0.4, 0.05],
    "final_change__text": [0.6, 0.2, 0.1],
    "propagation_gain__vision": [2.0, 3.0, 1.0],
}


def test_freezing_is_as_risky_as_what_later_layers_see_of_it() -> None:
    static, propagated = (
        criteria.load(name, {"freeze": 0.01}).risk(table(**MEASURED)).risk["F"]
        for name in ("skip-it-static", "skip-it")
    )
    # The last layer's vision states are read by nobody, however much they move.
    assert static == pytest.approx((0.1 * 0.2 / 0.01, 0.02 * 0.1 / 0.01, 0.0))
    assert propagated == pytest.approx((0.1 * 0.2 * 2 / 0.01, 0.02 * 0.1 * 3 / 0.01, 0.0))


def test_bypassing_needs_attention_on_vision_tokens_to_do_harm() -> None:
    static = criteria.load("skip-it-static", {"bypass": 1, "skip": 1}).risk(table(**MEASURED))
    assert static.risk["B"] == pytest.approx((0.16, 0.02, 0.02)) and static.risk["S"] == (0.4, 0.1, 0.2)
    blind = {**MEASURED, "vision_attention__text": [0.0, 0.0, 0.0]}
    assert criteria.load("skip-it").risk(table(**blind)).risk["B"] == (0.0, 0.0, 0.0)


def test_a_layer_without_attention_maps_may_read_everything() -> None:
    unknown = {**MEASURED, "vision_attention__text": [0.4, None, 0.1]}
    risk = criteria.load("skip-it-static", {"freeze": 1}).risk(table(**unknown))
    assert risk.risk["F"] == pytest.approx((0.1 * 1.0, 0.02 * 0.1, 0.0))
    words = {name: values for name, values in MEASURED.items() if "vision" not in name}
    assert criteria.load("skip-it").risk(table(**words)).risk["F"] == (0.0, 0.0, 0.0)


def test_propagation_tells_layers_apart_that_turn_the_state_alike() -> None:
    risk = criteria.load("skip-it", {"bypass": 1, "skip": 1}).risk(table(**MEASURED))
    # Cube roots of 0.4 * 0.9 * 0.6 = 0.216, 0.1 * 0.4 * 0.2 = 0.008 and 0.2 * 0.05 * 0.1 = 0.001.
    assert risk.risk["S"] == pytest.approx((0.6, 0.2, 0.1))
    assert risk.risk["B"] == pytest.approx((0.24, 0.04, 0.01))
    refused = {**MEASURED, "final_change__last": [None, 0.4, 0.05]}  # counts as the worst of the others
    worst = (0.4 * 0.4 * 0.6) ** (1 / 3)
    assert criteria.load("skip-it", {"skip": 1}).risk(table(**refused)).risk["S"] == pytest.approx((worst, 0.2, 0.1))


PARTS: dict[str, list[float | None]] = {
    "operator_distance_at_attention__vision": [0.05, 0.01, 0.2],
    "operator_distance_at_attention__text": [0.2, 0.05, 0.1],
    "operator_distance_at_attention__all": [0.1, 0.02, 0.15],
    "operator_angle_at_attention__last": [0.1, 0.04, 0.2],
    "operator_share_at_attention__text": [0.5, 0.5, 1.0],
    "operator_share_at_attention__last": [0.5, 0.25, 1.0],
    "operator_distance_at_mlp__vision": [0.04, 0.03, None],
    "operator_distance_at_mlp__text": [0.3, 0.02, None],
    "operator_distance_at_mlp__all": [0.2, 0.03, None],
    "operator_angle_at_mlp__last": [0.3, 0.08, None],
    "operator_share_at_mlp__text": [0.9, 0.9, None],
    "operator_share_at_mlp__last": [0.8, 0.9, None],
}


def test_parts_are_as_risky_as_their_share_of_the_layer() -> None:
    risk = criteria.load("skip-it", {"skip": 1}).risk(table(**MEASURED, **PARTS))
    # Cube roots of angle x share x change at the last token x share x change over text.
    attention = [0.1 * 0.45 * 0.3, 0.04 * 0.1 * 0.1, 0.2 * 0.05 * 0.1]
    assert risk.risk["A"] == pytest.approx([each ** (1 / 3) for each in attention])
    assert risk.risk["M"] == pytest.approx(
        [(0.3 * 0.8 * 0.9 * 0.9 * 0.6) ** (1 / 3), (0.08 * 0.9 * 0.4 * 0.9 * 0.2) ** (1 / 3), math.inf]
    )
    # Vision's distance x what text reads of it later: nothing behind the last layer.
    assert risk.risk["Q"][2] == 0 and risk.risk["P"][2] == math.inf
    assert risk.risk["Q"][0] / risk.risk["P"][0] == pytest.approx(0.05 / 0.04)
    static = criteria.load("skip-it-static", {"skip": 0.1}).risk(table(**MEASURED, **PARTS))
    assert static.risk["A"] == pytest.approx((1.0, 0.4, 2.0))
    cosine = criteria.load("cosine").risk(table(**MEASURED, **PARTS))
    assert cosine.risk["A"] == (0.2, 0.05, 0.2) and cosine.risk["M"] == (0.3, 0.03, math.inf)
    everything = table(cosine_distance__all=[0.2, 0.4, 0.3], **PARTS)
    influence = criteria.load("block-influence").risk(everything)
    assert influence.risk["A"] == (0.1, 0.02, 0.15) and influence.risk["M"] == (0.2, 0.03, math.inf)


def test_a_layer_that_cannot_be_taken_apart_is_never_safe_in_parts() -> None:
    # Removing layer 2 changes nothing, and its MLP cannot be told from the rest.
    idle = {**MEASURED, "final_change__last": [0.9, 0.4, 0.0], "final_change__text": [0.6, 0.2, 0.0]}
    risk = criteria.load("skip-it").risk(table(**idle, **PARTS))
    assert risk.risk["M"][2] == risk.risk["P"][2] == math.inf and risk.risk["A"][2] == risk.risk["S"][2] == 0.0


def test_parts_without_a_risk_of_their_own_are_as_risky_as_the_layer() -> None:
    measured = table(**MEASURED)  # by a job that leaves out no parts
    for name in ("skip-it", "cosine"):
        risk = criteria.load(name).risk(measured)
        assert set(risk.risk) == set("FBS")
        assert [risk.of(layer, "A") for layer in range(3)] == list(risk.risk["S"]) and risk.order("M") == risk.order(
            "S"
        )


def test_criteria_read_parts_where_a_job_leaves_them_out() -> None:
    skip_it, influence = criteria.load("skip-it-causal"), criteria.load("block-influence")
    assert criteria.kinds_for(skip_it, "RFBS") == skip_it.needs
    assert set(criteria.kinds_for(skip_it, "RSM")) == {*skip_it.needs, "operators", "operator_causal"}
    assert criteria.kinds_for(influence, "RA") == ("distance", "operators")
    assert criteria.kinds_for(criteria.load("vtw"), "RA") == ("withdrawal",)


def test_the_contribution_of_a_part_is_its_own() -> None:
    actions = {f"layer_contribution_at_{name}__answer": [0.2, 0.1, 0.0] for name in ("freeze", "bypass", "skip")}
    actions["layer_contribution_at_skip_attention__answer"] = [0.02, 0.3, None]
    risk = criteria.load("skip-it-causal").risk(table(**MEASURED, **PARTS, **actions))
    assert risk.risk["A"] == pytest.approx((0.02, 0.3, math.inf), abs=1e-4)
    assert risk.of(0, "M") == pytest.approx(0.2, abs=1e-4)  # not measured: as skip


def test_the_causal_variant_is_the_contribution_with_ties_broken() -> None:
    actions = {f"layer_contribution_at_{name}__answer": [0.2, 0.0, 0.0] for name in ("freeze", "bypass", "skip")}
    risk = criteria.load("skip-it-causal").risk(table(**MEASURED, **actions))
    assert risk.risk["S"] == pytest.approx((0.2, 0.0, 0.0), abs=1e-4)
    assert risk.order("S") == (2, 1, 0)
