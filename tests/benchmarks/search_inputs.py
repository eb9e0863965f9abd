"""What a search is given beside evaluations, measured once: the criteria's measurements and a latency profile.

    python tests/benchmarks/search_inputs.py --model llava-12 --task easy-vqa

Writes search_inputs_<model>_<task>.json in tests/fixtures, or in --inputs, so that the search benchmark gives the same
proposals wherever it is run.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(PROJECT))

from workers.cluster.handler import Handler  # noqa: E402
from workers.cluster.settings import WorkerSettings  # noqa: E402
from workers.messages import (  # noqa: E402
    MeasureLinearRedundancy,
    MeasureRedundancy,
    ModelSource,
    ProfileLatency,
    Workload,
)
from workers.redundancy.kinds import finish  # noqa: E402
from workers.runtime.plan import LETTERS  # noqa: E402
from workers.tasks import load_spec, load_task  # noqa: E402

KINDS = ("distance", "cka", "angular", "operators", "attention", "propagation", "trials", "causal", "withdrawal")
LINEAR = "linear"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="llava-12")
    parser.add_argument("--name", help="of the file, where the model is a directory")
    parser.add_argument("--task", default="easy-vqa")
    parser.add_argument("--inputs", type=Path, default=PROJECT / "tests" / "fixtures", help="directory to write in")
    parser.add_argument("--calibration", type=int, default=64)
    parser.add_argument("--kinds", nargs="+", default=KINDS, help=f"of measurement; {LINEAR} for compensation")
    parser.add_argument("--dtype", default="auto", help="float32 where the processor has no bfloat16 instructions")
    options = parser.parse_args()
    spec = load_spec(options.task)
    task = load_task(spec.with_splits(calibration=options.calibration, unit="samples"))
    handler = Handler.load(
        ModelSource(options.model, device="cpu", dtype=options.dtype), task, WorkerSettings(worker=0, threads=1)
    )
    table = finish(handler.handle(MeasureRedundancy(tuple(kind for kind in options.kinds if kind != LINEAR), 0, 1)))
    profile = handler.handle(ProfileLatency(actions=LETTERS, repeats=20, workload=Workload(1, 4)))
    path = options.inputs / f"search_inputs_{options.name or options.model}_{task.name}.json"
    rows = [[row.name, row.token_group, row.layer, float(f"{row.value:.6g}"), row.n] for row in table.rows]
    if LINEAR in options.kinds:
        linear = handler.handle(MeasureLinearRedundancy())
        rows += [
            [
                f"linear_redundancy@{own.end - own.layer}",
                "all",
                own.layer,
                float(f"{own.unexplained:.6g}"),
                linear.tokens,
            ]
            for own in linear.shares
        ]
    times = {
        "dense_latency_seconds": profile.dense_latency_seconds,
        "layer_seconds": {letter: list(seconds) for letter, seconds in profile.layer_seconds.items()},
        "relative_error": profile.relative_error,
        "device": profile.device,
        "workload": asdict(profile.workload),
    }
    document = {"num_layers": table.num_layers, "measurements": rows, "latency": times}
    path.write_text(json.dumps(document, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
