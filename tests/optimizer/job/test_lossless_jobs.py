"""The mode of a job file: what a lossless job refuses, and how it is told apart."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from optimizer.errors import UsageFault
from optimizer.job.inputs import tasks_of
from optimizer.job.spec import JobSpec

BASE: dict[str, Any] = {"model": {"path": "llava-12"}, "task": "scenes", "workload": {"new_tokens": 12}}


def job(**fields: Any) -> JobSpec:
    return JobSpec.model_validate({**BASE, "mode": "lossless", **fields})


def test_a_lossless_job_has_no_limit_on_accuracy_and_is_read_back_as_it_was() -> None:
    spec = job()
    assert spec.constraint.max_accuracy_drop is None
    assert JobSpec.model_validate(spec.model_dump(mode="json")) == spec
    assert [task.name for task in tasks_of(spec)] == ["scenes"]


def test_the_mode_tells_jobs_apart_and_standalone_jobs_of_before_are_found_again() -> None:
    standalone = JobSpec.model_validate(BASE)
    assert "mode" not in standalone.canonical()
    assert job().canonical()["mode"] == "lossless"
    assert job().digest() != standalone.digest()
    assert JobSpec.model_validate({**BASE, "mode": "standalone"}).digest() == standalone.digest()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"constraint": {"max_accuracy_drop": 0.01}}, "constraint.max_accuracy_drop: lossless plans answer as"),
        ({"constraint": {"min_accuracy": 0.5}}, "constraint.min_accuracy: lossless plans answer as"),
        ({"actions": ["skip", "freeze"]}, "leave actions at \\[skip\\]"),
        ({"workload": {"new_tokens": 4}}, "workload.new_tokens: 4 tokens leave too little to draft"),
        ({"workload": {}}, "needs 8 or more"),
        ({"latency": {"engine": "vllm"}}, "latency.engine: lossless plans are timed on the live model"),
        ({"guard": {"false_alarms": 0.01}}, "guard: lossless plans answer every prompt as the dense model does"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        job(**fields)


def test_limits_on_the_request_are_kept() -> None:
    spec = job(constraint={"max_accuracy_drop": None, "min_speedup": 1.2, "max_latency_ms": 90})
    assert (spec.constraint.min_speedup, spec.constraint.max_latency_ms) == (1.2, 90)


def test_tasks_without_long_answers_are_refused() -> None:
    with pytest.raises(UsageFault, match=r"answer.max_new_tokens \d leaves too little to draft"):
        tasks_of(job(task="easy-vqa"))
