"""Measure one model and task for the benchmarks of criteria: every measurement, and the harm of every single action.

Writes a JSON document: ``name``, ``layers``, ``rows`` (the table's measurements on the calibration split), ``images``
(of the held-out samples), and under ``harm`` by letter and layer the divergence and the score of each held-out sample,
with ``dense`` for the dense model's scores. Benchmarks read such files, so that nothing is measured twice.

    python tests/benchmarks/criterion_measured.py job.yaml --samples 64 --output measured.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from optimizer.job.inputs import prepare
from optimizer.job.loading import load_job
from optimizer.service.adhoc import adhoc_job
from optimizer.stages.progress import Progress
from optimizer.stages.redundancy import measured
from optimizer.validation.harm import measure
from optimizer.validation.report import plan_of
from storage.database import Database
from workers.redundancy.kinds import KINDS, TRIED, trial_layers
from workers.redundancy.table import LayerMeasurement, LayerTable


@dataclass(frozen=True)
class MeasuredModel:
    """What such a file holds: the table, and ``harm[letter][layer]``, ``[samples]``, in nats over the answer."""

    name: str
    table: LayerTable
    images: tuple[str, ...]
    harm: dict[str, dict[int, np.ndarray]]

    @classmethod
    def read(cls, file: Path) -> MeasuredModel:
        found = json.loads(file.read_text())
        rows = tuple(LayerMeasurement(**row) for row in found["rows"])
        rows += tuple(_trials_of(rows, found["layers"]))
        harm = {
            letter: {int(layer): np.array(each["kl"]) for layer, each in layers.items()}
            for letter, layers in found["harm"].items()
        }
        return cls(found["name"], LayerTable(found["layers"], rows), tuple(found["images"]), harm)

    def mean_harm(self, letter: str) -> Mapping[int, float]:
        """Mean divergence by layer, of the layers that may take the action."""
        return {layer: float(values.mean()) for layer, values in self.harm[letter].items()}


def _trials_of(rows: Sequence[LayerMeasurement], layers: int) -> Iterator[LayerMeasurement]:
    """Yield the kind ``trials`` of a document that has none: its replays are some of the causal kind's."""
    if any(row.name.startswith("trial_divergence") for row in rows):
        return
    names = {f"layer_contribution@{action.label}": f"trial_divergence@{action.label}" for action in TRIED}
    for row in rows:
        if row.name in names and row.layer in trial_layers(layers):
            yield replace(row, name=names[row.name])


def collect(file: Path, samples: int) -> dict[str, Any]:
    """Measure and evaluate what the database of the job does not hold yet."""
    spec = load_job(file)
    inputs = prepare(spec)
    with Database.open(spec.database) as db, adhoc_job(db, inputs, Progress(), "criterion-measured") as context:
        table = measured(context, tuple(KINDS))
        allowed = context.worker.allowed_actions
        plans = {
            letter: {
                layer: plan_of(len(allowed), (layer,), letter) for layer, own in enumerate(allowed) if letter in own
            }
            for letter in "FBS"
        }
        harm = measure(context, [plan for layers in plans.values() for plan in layers.values()], samples)
        return {
            "name": f"{Path(spec.model.path).name}, {context.task.name}",
            "layers": table.num_layers,
            "rows": [asdict(row) for row in table.rows],
            "images": list(harm.kl_images),
            "dense": harm.dense.tolist(),
            "harm": {
                letter: {
                    str(layer): {"kl": harm.kl[plan].tolist(), "scores": harm.scores[plan].tolist()}
                    for layer, plan in layers.items()
                    if plan in harm.kl
                }
                for letter, layers in plans.items()
            },
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", type=Path, help="job file, as of validate-theory")
    parser.add_argument("--samples", type=int, default=64, help="held-out samples (default: 64)")
    parser.add_argument("--output", type=Path, required=True, help="the document")
    arguments = parser.parse_args()
    arguments.output.write_text(json.dumps(collect(arguments.job, arguments.samples)))


if __name__ == "__main__":
    main()
