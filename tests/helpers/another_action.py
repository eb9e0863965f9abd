"""Add an action, D (dim), as one row of the table, and ask every consumer of actions what it makes of it.

Run as ``python another_action.py FLAGS`` with the row's flags as keywords, for example ``"vision_only=True"``. Prints a
JSON object: by consumer, what it gave, or ``"refused: ..."`` with the error.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROW = """    DIM = ActionRow(
        letter="D", past="dimmed", summary="summary of dim", meaning="are dimmed", work=0.25, {flags}
    )

"""
BEHIND_LAST_ROW = "    row: ActionRow\n"


def add_row(flags: str) -> None:
    """Load ``workers.runtime.plan`` from its source with the row in it, before anything else imports it."""
    name = "workers.runtime.plan"
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).read_text(encoding="utf-8")
    assert source.count(BEHIND_LAST_ROW) == 1
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    code = source.replace(BEHIND_LAST_ROW, ROW.format(flags=flags) + BEHIND_LAST_ROW)
    exec(compile(code, spec.origin, "exec"), module.__dict__)


def consumers() -> dict[str, Callable[[], Any]]:
    import tiny_llava
    import torch
    from export_builders import document
    from pydantic import ValidationError

    from optimizer import criteria
    from optimizer.cli import screen
    from optimizer.criteria.interface import everywhere
    from optimizer.exports.card import _what
    from optimizer.exports.document import json_schema
    from optimizer.exports.formats import llama_cpp
    from optimizer.exports.interface import needs_plain_skips
    from optimizer.job import template
    from optimizer.job.result import layers_by_action
    from optimizer.job.spec import JobSpec
    from optimizer.reports import chart, formatting, picture
    from optimizer.search.latency import LayerCounts
    from optimizer.search.seeds.nested import nested_sets
    from optimizer.search.space import PlanSpace
    from optimizer.search.surrogate.encoding import Encoding
    from optimizer.search.surrogate.trust_region import _one_hot
    from optimizer.stages.profile import CacheSizes
    from workers.compensation.recipe import Recipe
    from workers.latency.measure import _letters
    from workers.layerwise.decoder import Decoder
    from workers.layerwise.trie import steps_of
    from workers.models.describe import ModelDescription
    from workers.redundancy import kinds
    from workers.redundancy.table import LayerMeasurement, LayerTable
    from workers.runtime import SkipPlan, apply, describe, save_pruned
    from workers.runtime.plan import LETTERS

    torch.manual_seed(0)
    model = tiny_llava.build_model(tiny_llava.build_processor()).eval()
    layers = len(describe(model).allowed)
    plan = SkipPlan.parse("R" + "D" + "R" * (layers - 2))
    table = LayerTable(
        2,
        tuple(
            LayerMeasurement(name, group, layer, 0.1, None, 4)
            for name in ("cosine_distance",)
            for group in ("vision", "text")
            for layer in range(2)
        ),
    )

    def job() -> str:
        values = {"model": {"path": "m"}, "task": "easy-vqa", "actions": ["dim"]}
        return JobSpec.model_validate(values).letters

    def unknown_action() -> str:
        try:
            JobSpec.model_validate({"model": {"path": "m"}, "task": "easy-vqa", "actions": ["nothing"]})
        except ValidationError as error:
            return str(error)
        return "accepted"

    def run() -> str:
        ids = torch.tensor([[1, 2, 3]])
        with apply(model, plan), torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
        return f"{plan} ran over {len(plan.kept)} of {layers} layers"

    def pruned() -> str:
        import tempfile

        with tempfile.TemporaryDirectory() as directory:
            save_pruned(model, plan, f"{directory}/pruned")
        return f"{plan} written with {len(plan.kept)} of {layers} layers"

    return {
        "job file": job,
        "job file's message": unknown_action,
        "job template": lambda: template.ACTIONS,
        "layers by action": lambda: layers_by_action("RD"),
        "document's schema": lambda: json.dumps(json_schema()),
        "model card": lambda: _what(document("RD")),
        "plain checkpoint": lambda: needs_plain_skips(plan, "none") or f"takes {plan}",
        "llama.cpp": lambda: llama_cpp.FORMAT.refusal(plan, "none") or f"takes {plan}",
        "removal": lambda: f"{plan.removal} then {plan.remainder}",
        "screen": lambda: screen.coloured("RD").plain,
        "report's words": lambda: formatting.layers("RD"),
        "report's colours": lambda: picture.colour(chart.COLOURS["D"]),
        "counted work": lambda: {k: v for k, v in LayerCounts.of(2, LETTERS).layer_seconds.items() if k == "D"},
        "size of the cache": lambda: f"D: {CacheSizes(8.0, 2.0).of(SkipPlan.parse('RD'))}",
        "risk without actions": lambda: everywhere("c", (0.5, 0.5)).risk,
        "risk by action": lambda: criteria.load("cosine").risk(table).of(1, "D"),
        "nested sets": lambda: [str(e) for e in nested_sets(PlanSpace(("RD",) * 2, 2), everywhere("c", (0.1, 0.2)))],
        "nested sets of a risk by action": lambda: nested_sets(
            PlanSpace(("RD",) * 2, 2), criteria.load("cosine").risk(table)
        ),
        "surrogate's columns": lambda: Encoding(("RD", "RD")).columns,
        "trust region": lambda: f"D: {int((_one_hot(['RD'], 2) @ _one_hot(['DD'], 2).T)[0, 0])} layer alike",
        "measured interventions": lambda: [action.label for action in kinds.INTERVENTIONS],
        "profiled letters": lambda: _letters("RD"),
        "trie of steps": lambda: f"D: {[str(step) for step in steps_of(SkipPlan.parse('RDR'))]}",
        "gaps": lambda: f"D: {Recipe.parse('linear')} {len(steps_of(SkipPlan.parse('RDR'), maps=True))} steps",
        "layers that may": lambda: f"dim: {ModelDescription('f', 2, 1, {}).layers_for('dim')}",
        "description": lambda: sorted(action.label for action in describe(model).allowed[0]),
        "layer-wise decoder": lambda: f"D {sorted(a.letter for a in Decoder(model)._gathering[0])}",
        "live model": run,
        "pruned checkpoint": pruned,
    }


def main() -> None:
    add_row(sys.argv[1])
    found = {}
    for name, ask in consumers().items():
        try:
            found[name] = str(ask())
        except Exception as error:
            found[name] = f"refused: {type(error).__name__}: {error}"
    print(json.dumps(found))


if __name__ == "__main__":
    main()
