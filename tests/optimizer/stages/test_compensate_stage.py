"""Mixtures are refused, before a job computes anything, of a model that does not take text without an image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import in_process
import pytest

from optimizer.job.inputs import prepare
from optimizer.stages import compensate, pipeline
from optimizer.stages.context import JobFailed
from storage.database import Database
from workers.messages import CompareText, Failure, Reply, Request

MIXED = {"kind": "linear", "tokens": 200}


class WithoutText(in_process.OneWorker):
    """A worker whose model needs an image; its pool makes a failure of what model code raises."""

    def run(self, requests: Iterable[Request]) -> Iterator[tuple[int, Reply]]:
        for number, request in enumerate(requests):
            self.requests.append(request)
            try:
                yield number, self.handler.handle(request)
            except TypeError as error:
                yield number, Failure(request, str(error), 1)  # type: ignore[misc]


@pytest.fixture(scope="module")
def worker() -> WithoutText:
    return WithoutText("llava-12", prepare(in_process.spec()).task)


def test_a_model_that_takes_no_text_ends_the_job_before_anything_is_computed(
    store: Database, worker: WithoutText, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = worker.handler.loaded.model.forward

    def forward(*args: object, pixel_values: object = None, **kwargs: object) -> object:
        if pixel_values is None:
            raise TypeError("pixel_values is missing")
        return whole(*args, pixel_values=pixel_values, **kwargs)

    monkeypatch.setattr(worker.handler.loaded.model, "forward", forward)
    worker.requests.clear()
    context = in_process.context(store, worker, in_process.spec(compensation=MIXED))
    expected = r"does not take text without an image \(pixel_values is missing\); set compensation\.text_share: 0"
    with pytest.raises(JobFailed, match=expected):
        pipeline.run(context)
    assert len(worker.requests) == 1 and isinstance(worker.requests[0], CompareText)


@pytest.mark.parametrize(("section", "asked"), [(MIXED, 1), (MIXED | {"text_share": 0}, 0), ({"kind": "none"}, 0)])
def test_one_pass_is_asked_once_and_only_where_text_is_mixed_in(
    store: Database, worker: WithoutText, section: dict[str, object], asked: int
) -> None:
    worker.requests.clear()
    context = in_process.context(store, worker, in_process.spec(compensation=section))
    for _ in range(2):
        compensate.require_text(context)
    assert len(worker.requests) == asked
