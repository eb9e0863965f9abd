"""Exports in an environment of plain transformers, which a variable names; ``docs/exports.md`` says how it is made."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from export_builders import document

from optimizer.exports.verification import Verification, verify_export
from optimizer.exports.writing import export_plan
from workers.messages import ModelSource
from workers.models.checkpoint import BUNDLED_MODELS

pytestmark = pytest.mark.slow
PLAIN_VARIABLE = "SKIPPLAN_TEST_PLAIN_PYTHON"
SKIPS = "RRRSRRSRRRSR"
MIXED = "RRFSRBSBRFSR"


@pytest.fixture(scope="module")
def reference() -> Path:
    """The bundled model, whose answers mean something."""
    directory = BUNDLED_MODELS / "llava-12"
    if not (directory / "config.json").is_file():
        pytest.skip("the reference model llava-12 is not in configs/reference")
    return directory


def environment(variable: str, purpose: str) -> str:
    named = os.environ.get(variable)
    if not named or shutil.which(named) is None:
        pytest.skip(f"{variable} names no program: {purpose}")
    return named


def exported(reference: Path, format_name: str, plan: str, output: Path) -> Path:
    return export_plan(document(plan, reference), ModelSource(str(reference)), format_name, output).directory


def verified(directory: Path, reference: Path, **options: str) -> Verification:
    found = verify_export(directory, ModelSource(str(reference)), samples=32, **options)
    assert found.passed and len(found.answers) == 32, found
    assert len({live for live, _ in found.answers.values()}) > 2  # answers that could differ
    return found


@pytest.mark.parametrize(("format_name", "plan"), [("checkpoint", SKIPS), ("runtime", MIXED), ("vllm", SKIPS)])
def test_torch_and_transformers_alone_run_it(reference: Path, tmp_path: Path, format_name: str, plan: str):
    python = environment(PLAIN_VARIABLE, "a Python with torch, transformers and pillow only")
    listed = subprocess.run([python, "-m", "pip", "list", "--format=json"], capture_output=True, text=True, check=True)
    installed = {package["name"].lower() for package in json.loads(listed.stdout)}
    assert not installed & {"skipplan", "ray", "optuna", "sqlalchemy"}
    found = verified(exported(reference, format_name, plan, tmp_path / "out"), reference, python=python)
    assert found.largest_logit_difference == 0.0
