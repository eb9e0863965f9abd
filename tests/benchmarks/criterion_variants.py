"""Compare variants of the skip-it criterion by rank correlation with measured harm; print the table of docs/theory.md.

Harm is the mean KL divergence of the answer under each action at each layer. Variants are compared on the search split
(which one is the default was decided there) and reported on the held-out split, whose images nothing was decided on.
Everything is kept in the database given, so a second run, or one with more variants, evaluates nothing again.

    python tests/benchmarks/criterion_variants.py --samples 256 llava-12:easy-vqa llava-12:scenes smollm2-30:easy-vqa
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from optimizer import criteria
from optimizer.criteria import Risk
from optimizer.criteria.cosine import group_values
from optimizer.criteria.skip_it import later_attention, vision_attention
from optimizer.holding import open_pool
from optimizer.inputs import prepare
from optimizer.job import JobSpec
from optimizer.progress import Progress
from optimizer.stages.score import measured
from optimizer.undertaking import undertaking
from optimizer.validation.agreement import spearman
from optimizer.validation.harm import Measured, measure
from optimizer.validation.report import plan_of
from storage.database import Database
from workers.scoring.kinds import KINDS
from workers.scoring.table import LayerTable

Variant = Callable[[LayerTable], Risk]


def column(table: LayerTable, name: str, group: str) -> np.ndarray:
    return np.array(table.values(name, group, default=math.inf))


def conditions(vision: str, text: str, *, read: bool, gate: bool, change: str = "") -> Variant:
    """The paper's conditions over named measures of vision and text redundancy.

    ``read`` weighs vision by the later layers' attention to it, ``gate`` weighs bypass by the layer's own, ``change``
    names a measure of what the last layer's state does without the layer, which takes text's place; vision's is then
    multiplied by its propagation gain.
    """

    def risk(table: LayerTable) -> Risk:
        def of(measure: str, group: str) -> np.ndarray:
            values = column(table, measure, group)
            return 1 - values if measure == "cka" else np.maximum(values, 0.0)

        share = np.array(vision_attention(table))
        seen = np.array(later_attention(share.tolist())) if read else np.ones_like(share)
        moved, turned = of(vision, "vision") * seen, of(text, "last" if text not in ("cka",) else "text")
        if change:
            turned = column(table, change, "last")
            moved = moved * column(table, "propagation_gain", "vision")
        bypass = turned * share if gate else np.maximum(moved, turned)
        skip = turned if change or gate else np.maximum(moved, turned)
        return Risk("variant", {"F": tuple(moved), "B": tuple(bypass), "S": tuple(skip)})

    return risk


def geometric(table: LayerTable) -> Risk:
    vision, text = group_values(table, "cosine_distance")
    both = tuple(max(pair) for pair in zip(vision, text, strict=True))
    return Risk("geometric", {"F": vision, "B": both, "S": both})


TAIL = "cosine_distance_tail@0.1"

VARIANTS: dict[str, Variant] = {
    "skip-it (default)": criteria.load("skip-it").risk,
    "skip-it-static": criteria.load("skip-it-static").risk,
    "geometric": geometric,
    "geometric, last token": conditions("cosine_distance", "cosine_distance", read=False, gate=False),
    "proximal (tail at 0.1)": conditions(
        "cosine_distance_tail@0.1", "cosine_distance_tail@0.1", read=False, gate=False
    ),
    "geometric + attention": conditions("cosine_distance", "cosine_distance", read=True, gate=True),
    "CKA": conditions("cka", "cka", read=False, gate=False),
    "CKA + attention": conditions("cka", "cka", read=True, gate=True),
    "geometric + attention + propagation": conditions(
        "cosine_distance", "cosine_distance", read=True, gate=True, change="final_change"
    ),
    "CKA + attention + propagation": conditions("cka", "cka", read=True, gate=True, change="final_change"),
    "probes (functional)": conditions("cosine_distance", "functional_gap", read=True, gate=True),
    "probes (informational)": conditions("cosine_distance", "information_gap", read=True, gate=True),
    "skip-it-causal": criteria.load("skip-it-causal").risk,
    **{name: criteria.load(name).risk for name in ("cosine", "block-influence", "angular")},
}


def collect(model: str, task: str, samples: int, database: str) -> tuple[LayerTable, Measured, Measured, list[str]]:
    """The table of measurements, harm on the search and held-out splits, and the actions allowed per layer."""
    spec = JobSpec.model_validate(
        {
            "model": {"path": model},
            "task": task,
            "actions": ["skip", "freeze", "bypass"],
            "splits": {"calibration": 128, "search": samples, "held_out": samples, "unit": "samples"},
            "database": database,
        }
    )
    inputs = prepare(spec)
    with (
        Database.open(database) as db,
        open_pool(inputs) as pool,
        undertaking(db, inputs, pool, Progress(), "criterion-variants") as context,
    ):
        table = measured(context, tuple(kind for kind in KINDS if kind != "withdrawal"))
        allowed = list(context.worker.allowed_actions)
        plans = [
            plan_of(len(allowed), (layer,), letter)
            for letter in "FBS"
            for layer in range(len(allowed))
            if letter in allowed[layer]
        ]
        return table, measure(context, plans, samples, "search"), measure(context, plans, samples), allowed


def correlation(risk: Risk, harm: Measured, letter: str, allowed: list[str]) -> float | None:
    layers = [layer for layer in range(len(allowed)) if letter in allowed[layer]]
    plans = {layer: plan_of(len(allowed), (layer,), letter) for layer in layers}
    there = [layer for layer in layers if plans[layer] in harm.kl]
    if not there:
        return None
    divergences = np.array([harm.kl[plans[layer]].mean() for layer in there])
    return spearman(np.array([risk.of(layer, letter) for layer in there]), divergences)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pairs", nargs="+", metavar="MODEL:TASK")
    parser.add_argument("--samples", type=int, default=256, help="of the search and of the held-out split each")
    parser.add_argument("--database", default="sqlite:///criterion_variants.db")
    parser.add_argument("--output", type=Path, help="write the table here too")
    arguments = parser.parse_args()
    found = {pair: collect(*pair.rsplit(":", 1), arguments.samples, arguments.database) for pair in arguments.pairs}
    heads = [f"{pair.rsplit('/', 1)[-1]} {action}" for pair in found for action in ("F", "B", "S")]
    lines = ["| variant | " + " | ".join(heads) + " | mean, search | mean, held out |"]
    lines.append("|---" * (len(heads) + 3) + "|")
    for name, variant in VARIANTS.items():
        cells, means = [], ([], [])
        for table, search, held_out, allowed in found.values():
            risk = variant(table)
            for letter in "FBS":
                pair = [correlation(risk, harm, letter, allowed) for harm in (search, held_out)]
                cells.append(" / ".join("-" if rho is None else f"{rho:+.2f}" for rho in pair))
                for mean, rho in zip(means, pair, strict=True):
                    mean.append(0.0 if rho is None else rho)
        lines.append(f"| {name} | " + " | ".join([*cells, *(f"{np.mean(each):+.2f}" for each in means)]) + " |")
    print("\n".join(lines))
    if arguments.output:
        arguments.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
