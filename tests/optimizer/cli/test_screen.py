"""What a command says while it works: lines where there is no terminal, nothing when it is to be quiet."""

from __future__ import annotations

import io
import re
import sys

import pytest

from optimizer.cli.screen import Screen
from optimizer.stages import progress
from optimizer.stages.progress import Progress

CLOCK = re.compile(r"^\[\d+:\d\d\] ")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def work(screen: Screen) -> None:
    with screen.status("writing the plan"):
        pass
    with screen.stages() as display:
        shown = Progress(display)
        shown.begin("search", 48)
        shown.note("[2 workers], computing in float32")
        shown.begin("publish", 1)
    screen.say("a remark")


LINES = ["writing the plan", "search 0/48", "[2 workers], computing in float32", "publish 0/1"]


@pytest.mark.parametrize("as_json", [False, True])
def test_without_a_terminal_every_stage_is_a_line(capsys: pytest.CaptureFixture[str], as_json: bool) -> None:
    work(Screen(quiet=False, as_json=as_json))
    output, errors = capsys.readouterr()
    *lines, remark = errors.splitlines()
    assert all(CLOCK.match(line) for line in lines)
    assert [CLOCK.sub("", line) for line in lines] == LINES
    assert remark == "a remark" and output == ""


def test_something_long_is_said_again(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.02)
    said = ""
    with Screen(quiet=False).status("writing the plan"):
        while said.count("writing the plan") < 3:
            said += capsys.readouterr().err
    assert {CLOCK.sub("", line) for line in said.splitlines()} == {"writing the plan"}


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("as_json", [False, True])
def test_quiet_says_nothing(monkeypatch: pytest.MonkeyPatch, terminal: bool, as_json: bool) -> None:
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    work(Screen(quiet=True, as_json=as_json))
    assert stream.getvalue() == ""


@pytest.mark.parametrize("as_json", [False, True])
def test_a_terminal_shows_bars_and_no_lines(monkeypatch: pytest.MonkeyPatch, as_json: bool) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    work(Screen(quiet=False, as_json=as_json))
    said = terminal.getvalue()
    assert not re.search(r"\[\d+:\d\d\]", said)
    assert ("[2 workers]" in said and "publish" in said) is not as_json
