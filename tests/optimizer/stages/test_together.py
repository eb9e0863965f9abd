"""Stages that run together: they take turns, wait at the same time, and end as they would one after another."""

from __future__ import annotations

import threading
import time
from functools import partial

import pytest
from in_process import OneWorker, context, spec

from optimizer.stages.together import Abandoned, Turns
from storage.database import Database
from storage.queue import stages

LONG = 20.0


def wait_for(turns: Turns, event: threading.Event) -> None:
    with turns.waiting():
        assert event.wait(LONG)


def test_a_stage_goes_on_while_another_waits() -> None:
    turns, asked = Turns(), threading.Event()

    def first() -> str:
        wait_for(turns, asked)  # only the second sets it
        return "first"

    def second() -> str:
        asked.set()
        return "second"

    assert turns.together(first, second) == ["first", "second"]
    assert turns.together() == []


def test_one_computes_at_a_time() -> None:
    turns, computing, most = Turns(), [0], [0]

    def stage() -> None:
        for _ in range(20):
            computing[0] += 1
            most[0] = max(most[0], computing[0])
            time.sleep(0.0005)
            computing[0] -= 1
            with turns.waiting():
                time.sleep(0.0005)

    turns.together(stage, partial(turns.together, stage, stage), stage)  # in groups as well
    assert most == [1]


def test_the_error_of_the_stage_that_would_have_come_first_is_raised() -> None:
    turns, failed, went_on = Turns(), threading.Event(), []

    def first() -> None:
        wait_for(turns, failed)
        went_on.append("first")
        raise ValueError("of the first")

    def second() -> None:
        failed.set()
        raise KeyError("of the second")

    def third() -> None:
        wait_for(turns, failed)
        went_on.append("third")

    with pytest.raises(ValueError, match="of the first"):
        turns.together(first, second, third)
    assert went_on == ["first"]  # the third was abandoned when its wait ended


def test_parts_of_a_stage_are_abandoned_with_it_and_errors_are_not_swallowed() -> None:
    turns, failed, begun, seen = Turns(), threading.Event(), threading.Semaphore(0), []

    def first() -> None:
        with turns.waiting():
            assert begun.acquire(timeout=30) and begun.acquire(timeout=30)
        failed.set()
        raise ValueError("of the first")

    def part() -> None:
        begun.release()
        try:
            wait_for(turns, failed)
            with turns.waiting():
                time.sleep(0.2)
            with turns.waiting():
                pass
        except Exception as error:
            seen.append(error)
        except Abandoned:
            seen.append("abandoned")
            raise

    with pytest.raises(ValueError, match="of the first"):
        turns.together(first, lambda: turns.together(part, part))
    assert seen == ["abandoned", "abandoned"]


def test_a_stage_goes_on_beside_its_parts_and_gets_what_they_return_or_raise() -> None:
    turns, computed, failed, seen = Turns(), threading.Event(), threading.Event(), []

    def part(number: int) -> int:
        wait_for(turns, computed)
        if number == 1:
            failed.set()
            raise ValueError("of the second")
        wait_for(turns, failed if number == 2 else computed)
        with turns.waiting():
            pass
        seen.append(number)
        return number

    def stage() -> None:
        with turns.beside() as begin:
            ends = [begin(partial(part, number)) for number in range(3)]
            computed.set()  # all three wait for this
            assert ends[0]() == 0
            ends[1]()

    with pytest.raises(ValueError, match="of the second"):
        turns.together(stage)
    assert seen == [0]  # the third was abandoned


def test_what_two_stages_need_is_computed_once(store: Database, worker: OneWorker) -> None:
    here, computed = context(store, worker, spec()), []

    def compute() -> int:
        computed.append(1)
        with here.turns.waiting():
            time.sleep(0.2)  # the other asks for it meanwhile
        return 7

    both = [partial(here.load_or_compute, "shared", int, compute)] * 2
    assert here.turns.together(*both) == [7, 7]
    assert computed == [1]
    assert stages.get(store, here.job.id, "shared").payload == {"value": 7}  # type: ignore[union-attr]
