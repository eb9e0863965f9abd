"""Measure one model and task for the benchmarks of criteria: every measurement, and the harm of every single action.

Writes a JSON document: ``version`` of the format, ``name``, ``model`` and ``task`` (fingerprint and hash), ``job`` (the
job file), ``samples``, ``layers``, ``rows`` (the table's measurements on the calibration split), ``images`` (of the
held-out samples), and under ``harm`` by letter and layer the divergence and the score of each held-out sample, with
``dense`` for the dense model's scores. Benchmarks read such files, so that nothing is measured twice.

    python tests/benchmarks/criterion_measured.py job.yaml --samples 64 --output measured.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from optimizer.job.inputs import prepare, task_hash
from optimizer.job.loading import load_job
from optimizer.service.adhoc import adhoc_job
from optimizer.stages.progress import Progress
from optimizer.stages.redundancy import measured
from optimizer.validation.harm import measure
from optimizer.validation.report import plan_of
from storage.database import Database
from workers.redundancy.kinds import KINDS, PER_OPERATOR
from workers.redundancy.table import LayerMeasurement, LayerTable

VERSION = 2
"""Of the documents, and of what the measurements in them mean."""


@dataclass(frozen=True)
class MeasuredModel:
    """What such a file holds: the table, and ``harm[letter][layer]``, ``[samples]``, in nats over the answer."""

    name: str
    model: str
    """Fingerprint."""
    task: str
    """Hash."""
    table: LayerTable
    images: tuple[str, ...]
    harm: dict[str, dict[int, np.ndarray]]

    @classmethod
    def read(cls, file: Path) -> MeasuredModel:
        """Read a document. Raises SystemExit for what is none, or of another version."""
        found = load(file)
        if found.get("version") != VERSION:
            raise SystemExit(f"{file}: not a document of version {VERSION}; measure it again")
        rows = tuple(LayerMeasurement(**row) for row in found["rows"])
        harm = {
            letter: {int(layer): np.array(each["kl"]) for layer, each in layers.items()}
            for letter, layers in found["harm"].items()
        }
        table = LayerTable(found["layers"], rows)
        return cls(found["name"], found["model"], found["task"], table, tuple(found["images"]), harm)

    def mean_harm(self, letter: str) -> Mapping[int, float]:
        """Mean divergence by layer, of the layers that may take the action."""
        return {layer: float(values.mean()) for layer, values in self.harm[letter].items()}


def load(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises SystemExit where there is none."""
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise SystemExit(f"{file}: not JSON ({error})") from None
    return found if isinstance(found, dict) else {}


def store(document: dict[str, Any], file: Path) -> None:
    """Write a document as a whole, or not at all."""
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(document))
    unfinished.replace(file)


def collect(file: Path, samples: int) -> dict[str, Any]:
    """Measure and evaluate what the database of the job does not hold yet."""
    spec = load_job(file)
    inputs = prepare(spec)
    with Database.open(spec.database) as db, adhoc_job(db, inputs, Progress(), "criterion-measured") as context:
        table = measured(context, tuple(kind for kind in KINDS if kind not in PER_OPERATOR.values()))
        allowed = context.worker.allowed_actions
        plans = {
            letter: {
                layer: plan_of(len(allowed), (layer,), letter) for layer, own in enumerate(allowed) if letter in own
            }
            for letter in "FBS"
        }
        harm = measure(context, [plan for layers in plans.values() for plan in layers.values()], samples)
        return {
            "version": VERSION,
            "model": context.worker.fingerprint,
            "task": task_hash(context.task),
            "job": yaml.safe_load(file.read_text()),
            "samples": samples,
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
    store(collect(arguments.job, arguments.samples), arguments.output)


if __name__ == "__main__":
    main()
