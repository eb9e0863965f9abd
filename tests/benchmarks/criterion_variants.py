"""Compare variants of the skip-it criterion by rank correlation with measured harm; print the tables of docs/theory.md.

Harm is the mean KL divergence of the answer under each action at each layer, on all samples of a split. The first table
is of the search split, and the default is chosen by it. The second is of the held-out split, whose images nothing was
decided on; jobs given with --untouched appear there alone, so no part of them can sway the choice.
Everything is kept in the jobs' databases, so a second run, or one with more variants, evaluates nothing again, nor what
`skipplan validate-theory` evaluated.

    python tests/benchmarks/criterion_variants.py llava.yaml scenes.yaml smollm2.yaml --untouched other.yaml
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from optimizer import criteria
from optimizer.criteria import Risk
from optimizer.criteria.published import group_values
from optimizer.criteria.skip_it import later_attention, vision_attention
from optimizer.job.inputs import prepare
from optimizer.job.loading import load_job
from optimizer.service.adhoc import adhoc_job
from optimizer.stages.progress import Progress
from optimizer.stages.redundancy import measured
from optimizer.statistics.rank_agreement import spearman
from optimizer.validation.harm import Measured, measure
from optimizer.validation.report import plan_of
from storage.database import Database
from workers.redundancy.kinds import KINDS
from workers.redundancy.table import LayerTable

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


def product(*removed: str, gain: bool, through: str = "text") -> Variant:
    """The form of ``skip-it`` with other measures: ``removed`` say what removing a layer does to the last token.

    ``name:group`` is that of another token group. Of several the geometric mean is taken. ``gain`` multiplies what
    freezing moves by its propagation gain; ``through`` names the queries whose attention on vision tokens weighs
    bypass.
    """

    def risk(table: LayerTable) -> Risk:
        named = [text.partition(":") for text in removed]
        columns = [column(table, name, group or "last") for name, _, group in named]
        moved = np.exp(np.mean([np.log(np.maximum(each, 1e-12)) for each in columns], axis=0))
        share = np.array(vision_attention(table))
        freeze = np.array(group_values(table, "cosine_distance")[0]) * np.array(later_attention(share.tolist()))
        if gain:
            freeze = freeze * column(table, "propagation_gain", "vision")
        own = share if through == "text" else np.array(table.values("vision_attention", through, default=1.0))
        return Risk("variant", {"F": tuple(freeze), "B": tuple(moved * own), "S": tuple(moved)})

    return risk


def geometric(table: LayerTable) -> Risk:
    vision, text = group_values(table, "cosine_distance")
    both = tuple(max(pair) for pair in zip(vision, text, strict=True))
    return Risk("geometric", {"F": vision, "B": both, "S": both})


VARIANTS: dict[str, Variant] = {
    "skip-it": criteria.load("skip-it").risk,
    "skip-it-static": criteria.load("skip-it-static").risk,
    "angle of the last token, gain": product("angular_distance@1", gain=True),
    "change at the top": product("final_change", gain=False),
    "change at the top, gain": product("final_change", gain=True),
    "change at the top, gain, last token's attention": product("final_change", gain=True, through="last"),
    "change of text at the top, gain": product("final_change:text", gain=True),
    "change of text and last token at the top, gain": product("final_change:text", "final_change", gain=True),
    "turn of text at the top, gain": product("final_distance:text", gain=True),
    "turn of text and last token at the top, gain": product("final_distance:text", "final_distance", gain=True),
    "angle, turn of text and last token at the top, gain": product(
        "angular_distance@1", "final_distance:text", "final_distance", gain=True
    ),
    "angle, change of text and last token at the top, gain": product(
        "angular_distance@1", "final_change:text", "final_change", gain=True
    ),
    "turn at the top, gain": product("final_distance", gain=True),
    "angle and change at the top, gain": product("angular_distance@1", "final_change", gain=True),
    "angle and turn at the top, gain": product("angular_distance@1", "final_distance", gain=True),
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


@dataclass(frozen=True)
class Found:
    """What one job's model and task gave: measurements, the actions allowed per layer, and harm per split."""

    name: str
    table: LayerTable
    allowed: tuple[str, ...]
    harm: dict[str, Measured]


def collect(file: Path, splits: Sequence[str]) -> Found:
    """Measure and evaluate what the database of the job does not hold yet."""
    spec = load_job(file)
    inputs = prepare(spec)
    with (
        Database.open(spec.database) as db,
        adhoc_job(db, inputs, Progress(), "criterion-variants") as context,
    ):
        table = measured(context, tuple(kind for kind in KINDS if kind != "withdrawal"))
        allowed = tuple(context.worker.allowed_actions)
        plans = [
            plan_of(len(allowed), (layer,), letter)
            for letter in "FBS"
            for layer in range(len(allowed))
            if letter in allowed[layer]
        ]
        harm = {split: measure(context, plans, len(context.task.split(split)), split) for split in splits}
        return Found(f"{Path(spec.model.path).name}, {context.task.name}", table, allowed, harm)


def correlation(risk: Risk, found: Found, split: str, letter: str) -> float | None:
    harm, layers = found.harm[split], len(found.allowed)
    plans = {layer: plan_of(layers, (layer,), letter) for layer in range(layers) if letter in found.allowed[layer]}
    there = [layer for layer, plan in plans.items() if plan in harm.kl]
    if not there:
        return None
    divergences = np.array([harm.kl[plans[layer]].mean() for layer in there])
    return spearman(np.array([risk.of(layer, letter) for layer in there]), divergences)


def compared(found: Sequence[Found], split: str) -> list[str]:
    """One row a variant: rho per job and action, per action the mean over jobs, and the mean and smallest of all."""
    letters = {"F": "freeze", "B": "bypass", "S": "skip"}
    heads = [f"{each.name}: {action}" for each in found for action in letters.values()]
    heads += [f"mean {action}" for action in letters.values()] if len(found) > 1 else []
    lines = ["| variant | " + " | ".join([*heads, "mean", "smallest"]) + " |", "|---" * (len(heads) + 3) + "|"]
    for name, variant in VARIANTS.items():
        risks = [variant(each.table) for each in found]
        rho = np.array(
            [
                [correlation(risk, each, split, letter) or 0.0 for letter in letters]
                for risk, each in zip(risks, found, strict=True)
            ]
        )
        means = rho.mean(0).tolist() if len(found) > 1 else []
        cells = [*rho.ravel().tolist(), *means, rho.mean(), rho.min()]
        lines.append(f"| {name} | " + " | ".join(f"{each:+.2f}" for each in cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("jobs", nargs="+", type=Path, help="job files, as of validate-theory")
    parser.add_argument("--untouched", nargs="*", type=Path, default=[], help="job files that are held out as a whole")
    arguments = parser.parse_args()
    chosen_on = [collect(file, ("search", "held_out")) for file in arguments.jobs]
    untouched = [collect(file, ("held_out",)) for file in arguments.untouched]
    print("Search split:\n", *compared(chosen_on, "search"), sep="\n")
    print("\nHeld-out split:\n", *compared(chosen_on, "held_out"), sep="\n")
    if untouched:
        print("\nHeld-out model and task:\n", *compared(untouched, "held_out"), sep="\n")


if __name__ == "__main__":
    main()
