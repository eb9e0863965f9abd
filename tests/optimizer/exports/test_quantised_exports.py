"""Exports of a quantised model, in both formats that transformers loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import quantised
from export_builders import document

from optimizer.exports.verification import verify_export
from optimizer.exports.writing import export_plan
from workers.messages import ModelSource


@pytest.mark.parametrize(("plan", "form"), [("RSRRSR", "checkpoint"), ("RSFRBR", "runtime")])
def test_an_export_of_quantised_weights_answers_as_the_model_under_its_plan(
    tmp_path: Path, loaded_here: None, plan: str, form: str
) -> None:
    packed, _ = quantised.save(tmp_path, "int8", ignore=("layers.2.mlp.down_proj",))
    source = ModelSource(str(packed))
    written = export_plan(document(plan, packed), source, form, tmp_path / "out")
    found = verify_export(written.directory, source, samples=2)
    assert found.passed and len(found.answers) == 2, found
