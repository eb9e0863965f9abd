"""Validate criteria: for every action and criterion, does predicted risk agree with measured harm?

Risks come from the calibration split, harm from the held-out one. The report must be able to fail: each criterion gets
a verdict from its interval, and the default criterion's risks in a random order stand beside it as a control.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from optimizer import criteria
from optimizer.criteria import Criterion, Risk
from optimizer.criteria.interface import MEASURED_LETTERS
from optimizer.registries import CRITERIA
from optimizer.stages.context import JobContext, JobFailed
from optimizer.stages.redundancy import measured
from optimizer.statistics.rank_agreement import Agreement
from optimizer.validation import claims
from optimizer.validation.claims import Cell, Claim
from optimizer.validation.harm import Measured, PlanHarm, measure
from workers.errors import MeasurementError
from workers.redundancy.kinds import KINDS, OPERATORS
from workers.redundancy.table import LayerTable
from workers.runtime.plan import Action

CONTROL = "scrambled (control)"
RANDOM_SETS = 3


@dataclass(frozen=True)
class SetHarm:
    """A set of layers that take one action together, and the harm that does."""

    action: str
    kind: str
    """``safe``, ``unsafe``, ``random``, or the name of the published method that chose it."""
    layers: tuple[int, ...]
    harm: PlanHarm | None = None
    """None where the model cannot take the plan, or it could not be evaluated."""


@dataclass(frozen=True)
class Overlap:
    """How many of the layers a published method takes are among the equally many that the criterion calls safest."""

    action: str
    method: str
    size: int
    shared: int
    expected: float
    """By chance."""


@dataclass(frozen=True)
class ActionReport:
    """One action: the layers that may take it, what it does at each, and how well each criterion foresaw that."""

    action: str
    layers: tuple[int, ...]
    kl: tuple[float, ...] | None
    difference: tuple[float, ...]
    """Accuracy less the dense model's; a loss is negative."""
    risks: dict[str, tuple[float, ...]]
    """Per criterion the risk of ``layers``."""
    by_kl: dict[str, Agreement]
    by_accuracy: dict[str, Agreement]
    """Per criterion the agreement with divergence, and with the loss of accuracy."""
    called_safe: tuple[int, ...]
    """Layers whose risk the criterion puts at 1 or below, its threshold for safe."""


@dataclass(frozen=True)
class ValidationReport:
    """Result of ``validate-theory`` for one model and task."""

    model: str
    task: str
    criterion: str
    thresholds: dict[str, float]
    calibration_samples: int
    held_out_samples: int
    held_out_images: int
    dense_accuracy: float
    set_size: int
    confidence: float
    seed: int
    settings: str
    actions: tuple[ActionReport, ...]
    sets: tuple[SetHarm, ...]
    overlaps: tuple[Overlap, ...]
    claims: tuple[Claim, ...]
    conditions: tuple[Cell, ...]
    """The layers by the two conditions of bypass, with the harm of bypassing one of them."""
    failed: dict[str, str]
    left_out: dict[str, str]
    """Criteria that read what this model does not give, and why."""

    def to_json(self) -> dict[str, Any]:
        return {name: finite(value) for name, value in asdict(self).items()}


def validate(
    context: JobContext,
    *,
    samples: int,
    set_size: int | None = None,
    others: Sequence[Criterion] | None = None,
) -> ValidationReport:
    """Measure what is missing, predict, evaluate, compare.

    ``others`` are the criteria beside the job's own (all that are known when ``None``); ``set_size`` is the number of
    layers of the sets that are tried together (a quarter of the stack when ``None``). Raises JobFailed.
    """
    spec = context.spec
    own = criteria.load(spec.criterion, spec.thresholds)
    if others is None:
        others = [criteria.load(name) for name in CRITERIA if name != own.name]
    predicted = _predict(context, own, others)
    confidence, seed, num_layers = spec.constraint.confidence, spec.search.seed, predicted.table.num_layers
    predicted.risks[CONTROL] = scrambled(predicted.risks[own.name], seed)
    # Leaving out a part of a layer is compared where the job searches it: it takes passes of its own.
    letters = MEASURED_LETTERS + "".join(each.letter for each in OPERATORS if each.letter in spec.letters)
    allowed = {letter: layers for letter in letters if (layers := _allowed(context, letter))}
    if not allowed:
        raise JobFailed("no layer of this model may take any action")
    size = set_size or max(1, round(num_layers / 4))
    sets = _sets(predicted, allowed, size, seed)
    singles = [plan_of(num_layers, (layer,), letter) for letter in allowed for layer in allowed[letter]]
    together = [plan_of(num_layers, each.layers, each.action) for each in sets]
    bands = {
        (name, letter): plan_of(num_layers, claims.band(name, allowed[letter]), letter)
        for name in claims.BANDS
        for letter in claims.BAND_ACTIONS
        if letter in allowed
    }
    harm = measure(context, [*singles, *together, *bands.values()], samples)
    in_bands = {key: harm.harm(plan, confidence, seed) for key, plan in bands.items()}
    cells, both_needed = _conditions(predicted, allowed, harm, confidence)
    choices = _choices(predicted, allowed, size)
    return ValidationReport(
        model=spec.model.path,
        task=context.task.name,
        criterion=own.name,
        thresholds=dict(own.thresholds),
        calibration_samples=len(context.task.calibration),
        held_out_samples=len(harm.images),
        held_out_images=len(set(harm.images)),
        dense_accuracy=float(harm.dense.mean()),
        set_size=size,
        confidence=confidence,
        seed=seed,
        settings=context.settings,
        actions=tuple(_action(letter, allowed[letter], predicted, harm, confidence, seed) for letter in allowed),
        sets=tuple(
            replace(each, harm=harm.harm(plan, confidence, seed)) for each, plan in zip(sets, together, strict=True)
        ),
        overlaps=tuple(
            Overlap(letter, name, size, len(set(theirs) & set(ours)), size * size / len(allowed[letter]))
            for name, letter, theirs, ours in choices
        ),
        claims=(
            *claims.band_claims(in_bands, spec.constraint.max_accuracy_drop),
            both_needed,
            claims.overlap_claim([each[1:] for each in choices], allowed, confidence, seed),
        ),
        conditions=cells,
        failed=harm.failed,
        left_out=predicted.left_out,
    )


@dataclass(frozen=True)
class _Predicted:
    """Every criterion's risks, and the table they are made of."""

    criteria: tuple[Criterion, ...]
    """Those that this model gives the measurements for; the job's own first."""
    risks: dict[str, Risk]
    table: LayerTable
    left_out: dict[str, str]

    @property
    def own(self) -> Risk:
        return self.risks[self.criteria[0].name]

    def choice(self, criterion: Criterion, letter: str, layers: Sequence[int], size: int) -> tuple[int, ...]:
        """Return the layers a published method takes; one that removes a single block takes its best one."""
        block = getattr(criterion, "best_block", None)
        if block is not None:
            return tuple(block(self.table, size))
        return safest(self.risks[criterion.name], letter, layers, size)


def _predict(context: JobContext, own: Criterion, others: Sequence[Criterion]) -> _Predicted:
    """Measure for all criteria and predict. Raises JobFailed when the job's own criterion cannot be had."""
    needs = {each.name: criteria.kinds_for(each, context.spec.letters) for each in (own, *others)}
    needed = (*claims.NEEDS, *(kind for kinds in needs.values() for kind in kinds if kind in KINDS))
    common = dict.fromkeys(needed)
    table = measured(context, tuple(common))  # in as few passes as there can be
    risks: dict[str, Risk] = {}
    left_out: dict[str, str] = {}
    for each in (own, *others):
        try:
            table = measured(context, (*common, *needs[each.name]))
            risks[each.name] = each.risk(table)
        except (JobFailed, MeasurementError) as error:
            if each is own:
                raise JobFailed(f"criterion {own.name}: {error}") from None
            left_out[each.name] = str(error)
    return _Predicted(tuple(each for each in (own, *others) if each.name in risks), risks, table, left_out)


def plan_of(num_layers: int, layers: Sequence[int], letter: str) -> str:
    """Return the plan that takes an action at some layers and runs the others."""
    return "".join(letter if layer in layers else Action.RUN.letter for layer in range(num_layers))


def scrambled(risk: Risk, seed: int) -> Risk:
    """Move the risks to other layers: a criterion whose numbers belong to no layer."""
    generator = np.random.default_rng(seed)
    return Risk(CONTROL, {letter: tuple(generator.permutation(values)) for letter, values in risk.risk.items()})


def safest(risk: Risk, letter: str, layers: Sequence[int], size: int) -> tuple[int, ...]:
    """Return the ``size`` least risky of the layers that may take an action, in the stack's order."""
    ordered = [layer for layer in risk.order(letter) if layer in layers]
    return tuple(sorted(ordered[:size]))


def _allowed(context: JobContext, letter: str) -> tuple[int, ...]:
    """Layers that the model lets take an action."""
    return tuple(layer for layer, letters in enumerate(context.worker.allowed_actions) if letter in letters)


def _sets(predicted: _Predicted, allowed: Mapping[str, tuple[int, ...]], size: int, seed: int) -> list[SetHarm]:
    """Per action the safest, the riskiest and random layers, and each published method's choice, all equally large."""
    generator = np.random.default_rng(seed)
    found: list[SetHarm] = []
    for letter, layers in allowed.items():
        if len(layers) < 2 * size:
            continue  # the safest and the riskiest must not be the same layers
        order = [layer for layer in predicted.own.order(letter) if layer in layers]
        found.append(SetHarm(letter, "safe", tuple(sorted(order[:size]))))
        found.append(SetHarm(letter, "unsafe", tuple(sorted(order[-size:]))))
        for _ in range(RANDOM_SETS):
            drawn = generator.choice(np.asarray(layers), size=size, replace=False)
            found.append(SetHarm(letter, "random", tuple(sorted(int(layer) for layer in drawn))))
        found += [
            SetHarm(letter, each.name, predicted.choice(each, letter, layers, size))
            for each in predicted.criteria[1:]
            if letter in each.published_for
        ]
    return found


def _choices(
    predicted: _Predicted, allowed: Mapping[str, tuple[int, ...]], size: int
) -> list[tuple[str, str, tuple[int, ...], tuple[int, ...]]]:
    """By published method and action: its name, the letter, its layers, and the equally many that are safest."""
    return [
        (
            each.name,
            letter,
            predicted.choice(each, letter, allowed[letter], size),
            safest(predicted.own, letter, allowed[letter], size),
        )
        for each in predicted.criteria[1:]
        for letter in each.published_for
        if len(allowed.get(letter, ())) >= size
    ]


def _conditions(
    predicted: _Predicted, allowed: Mapping[str, tuple[int, ...]], harm: Measured, confidence: float
) -> tuple[tuple[Cell, ...], Claim]:
    """Sort the layers that may be bypassed by the conditions; what the model does not give leaves it open."""
    num_layers = predicted.table.num_layers
    plans = {layer: plan_of(num_layers, (layer,), claims.BYPASS) for layer in allowed.get(claims.BYPASS, ())}
    divergences = claims.divergences_of(harm, plans)
    return claims.condition_cells(predicted.table, divergences, confidence)


def _action(
    letter: str, layers: tuple[int, ...], predicted: _Predicted, harm: Measured, confidence: float, seed: int
) -> ActionReport:
    plans = {layer: plan_of(predicted.table.num_layers, (layer,), letter) for layer in layers}
    there = tuple(layer for layer in layers if plans[layer] in harm.scores)
    shape = (len(there), len(harm.dense))
    differences = np.array([harm.scores[plans[layer]] - harm.dense for layer in there]).reshape(shape)
    with_kl = bool(there) and all(plans[layer] in harm.kl for layer in there)
    divergences = np.array([harm.kl[plans[layer]] for layer in there]) if with_kl else None
    risks = {name: tuple(risk.of(layer, letter) for layer in there) for name, risk in predicted.risks.items()}

    def agreements(measured_harm: np.ndarray, images: Sequence[str]) -> dict[str, Agreement]:
        return {
            name: Agreement.over_layers(values, measured_harm, images, confidence, seed)
            for name, values in risks.items()
        }

    return ActionReport(
        action=Action.of(letter).label,
        layers=there,
        kl=None if divergences is None else tuple(divergences.mean(1).tolist()),
        difference=tuple(differences.mean(1).tolist()),
        risks=risks,
        by_kl={} if divergences is None else agreements(divergences, harm.kl_images),
        by_accuracy=agreements(-differences, harm.images),
        called_safe=tuple(layer for layer in there if predicted.own.of(layer, letter) <= 1.0),
    )


def finite(value: Any) -> Any:
    """Plain values for JSON: numbers that are not finite are None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): finite(each) for key, each in value.items()}
    return [finite(each) for each in value] if isinstance(value, list | tuple) else value
