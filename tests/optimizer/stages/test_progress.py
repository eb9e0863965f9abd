"""What is said of a job's stages, when, and by whom."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar

import pytest

from optimizer.stages import progress
from optimizer.stages.progress import Progress, StageLines, State

job: ContextVar[int] = ContextVar("job", default=0)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert true()


def test_a_line_is_written_as_each_stage_begins_and_none_for_its_steps() -> None:
    said: list[str] = []
    with StageLines(lambda event, state: said.append(f"{event} {state.text}"), said.append) as lines:
        shown = Progress(lines)
        shown.begin("start workers")
        shown.note("2 workers")
        shown.begin("search", 48)
        for _ in range(3):
            shown.advance(news="RRS")
        shown.begin("publish", 1)
    assert said == ["stage start workers", "2 workers", "stage search 0/48", "stage publish 0/1"]


def test_a_stage_that_goes_on_is_said_again_until_the_block_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.05)
    said: list[tuple[str, str, int]] = []
    with StageLines(lambda event, state: said.append((event, state.text, job.get())), str) as lines:
        shown = Progress(lines)
        mark = job.set(7)  # as the log marks its lines
        shown.begin("search", 48)
        shown.advance(5, news="RRSS 0.9")
        job.reset(mark)
        until(lambda: len(said) >= 4)
    number = len(said)
    assert said[0] == ("stage", "search 0/48", 7)
    assert set(said[1:]) == {("progress", "search 5/48: RRSS 0.9", 7)}
    time.sleep(0.2)
    assert len(said) == number


def test_a_stage_that_has_just_begun_is_not_said_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 1.0)
    said: list[str] = []
    with StageLines(lambda event, state: said.append(event), str) as lines:
        began = time.monotonic()
        for stage in range(20):
            lines.update(State(f"{stage}"))
            time.sleep(0.1)
        waited = time.monotonic() - began
    assert said.count("stage") == 20
    assert waited > 1.5 and said.count("progress") <= waited - 2 + 0.5  # only where this machine stood still


def test_a_states_text_says_what_is_known() -> None:
    assert State("search", 3, 10, "RRS").text == "search 3/10: RRS"
    assert State("measure redundancy", 0, 0).text == "measure redundancy"
    assert State("evaluate", 3).text == "evaluate 3"
