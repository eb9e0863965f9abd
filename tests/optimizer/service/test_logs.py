"""One line per event, in both formats, and no password in any of them."""

from __future__ import annotations

import io
import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimizer.service import logs


@pytest.fixture(autouse=True)
def quiet_afterwards():
    yield
    logs.configure(None)


def test_json_lines_carry_the_job_and_the_fields():
    stream = io.StringIO()
    logs.configure("json", stream)
    with logs.of_job(7):
        logs.log("worker_lost", worker=1, reason="killed\nby hand", share=0.5)
    logs.log("resting", seconds=2)
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "level": "info",
        "event": "worker_lost",
        "job": 7,
        "worker": 1,
        "reason": "killed by hand",
        "share": 0.5,
    }
    assert "job" not in second


def test_text_lines_are_for_people():
    stream = io.StringIO()
    logs.configure("text", stream)
    with logs.of_job(7):
        logging.getLogger("workers.cluster.telemetry").info(
            "worker_lost", extra={"fields": {"reason": "out of memory"}}
        )
    assert stream.getvalue().split(" ", 2)[2] == 'worker_lost job=7 reason="out of memory"\n'


def test_nothing_is_written_unless_asked_for(capsys: pytest.CaptureFixture[str]):
    logs.configure(None)
    logging.getLogger("storage.database").warning("trying again")
    assert capsys.readouterr() == ("", "")


HEAD, TAIL = "Qx9~", "~9xQ"
"""Around every password: text that no log line has by itself, so that a part of a password is seen too."""
between = st.text(st.characters(min_codepoint=33, max_codepoint=126))
among_options = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="&'\""))


@given(between, among_options)
def test_passwords_never_reach_a_line(middle, among):
    password = HEAD + middle + TAIL
    for url in (
        f"postgresql://user:{password}@host:5432/name?sslmode=require",
        f"postgresql+psycopg://user:{password}@host/name",
        f"postgresql://host/name?user=me&password={HEAD + among + TAIL}&sslmode=require",
        f"redis://:{password}@host",
    ):
        for form in logs.FORMATS:
            stream = io.StringIO()
            logs.configure(form, stream)
            logs.log("database_away", reason=f"cannot reach {url}: refused", url=url)
            logging.getLogger("storage.database").warning("trying again in %.2f s: %s", 0.1, url)
            assert HEAD not in stream.getvalue() and TAIL not in stream.getvalue()
            assert "host" in stream.getvalue()
