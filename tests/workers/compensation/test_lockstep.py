from __future__ import annotations

import threading

import pytest

from workers.compensation.lockstep import HaltingCall


def counting(start: int, log: list[str]):
    def body(halt) -> None:
        value = start
        for _ in range(3):
            log.append(f"{start} tells {value}")
            value = halt(value)
        log.append(f"{start} ends with {value}")

    return body


def test_calls_take_turns_and_get_their_answers() -> None:
    log: list[str] = []
    calls = [HaltingCall(counting(start, log)) for start in (10, 20)]
    told = [call.advance() for call in calls]
    while not calls[0].finished:
        told = [call.advance(value + 1) for call, value in zip(calls, told, strict=True)]
    assert told == [None, None] and all(call.finished for call in calls)
    assert log == [
        *("10 tells 10", "20 tells 20", "10 tells 11", "20 tells 21", "10 tells 12", "20 tells 22"),
        *("10 ends with 13", "20 ends with 23"),
    ]
    for call in calls:
        call.close()
    with pytest.raises(RuntimeError, match="has ended"):
        calls[0].advance()


def test_what_the_body_raises_reaches_the_caller() -> None:
    def body(halt) -> None:
        halt(1)
        raise ValueError("broken")

    with HaltingCall(body) as call:
        assert call.advance() == 1
        with pytest.raises(ValueError, match="broken"):
            call.advance()
        assert call.finished


def test_a_call_left_halted_is_unwound_and_its_thread_ends() -> None:
    cleaned: list[bool] = []

    def body(halt) -> None:
        try:
            halt(1)
            raise AssertionError("nobody resumed this call")
        finally:
            cleaned.append(True)

    before = threading.active_count()
    with HaltingCall(body) as call:
        call.advance()
    with HaltingCall(body):
        pass  # never advanced
    assert cleaned == [True] and threading.active_count() == before
