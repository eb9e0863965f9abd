"""Every command that the documentation shows exists, with the options it shows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from optimizer.cli.main import app

PROJECT = Path(__file__).resolve().parents[2]
COMMAND_LINE: Any = typer.main.get_command(app)
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "configs/**/*.md", "configs/**/*.yaml", "Makefile")
    for path in PROJECT.glob(pattern)
)
GLOBAL_FLAGS = {"--debug", "--help", "--install-completion", "--show-completion"}
PLACEHOLDERS = {"COMMAND"}


def shown(text: str) -> Iterator[list[str]]:
    """The commands in code blocks, code spans, comments of examples and recipes, as words without ``skipplan``."""
    text = re.sub(r"\\\n\s*", " ", text)
    fenced = re.findall(r"^```(?:sh|console|bash)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = [re.sub(r"(^|\s)#.*", "", line) for block in fenced for line in block.splitlines()]
    lines += re.findall(r"`((?:\S*/)?skipplan [^`]+)`", text)
    lines += re.findall(r"^#\s+(skipplan (?:run|validate|submit) \S+\.yaml.*)$", text, flags=re.MULTILINE)
    lines += re.findall(r"^\t\S*(skipplan .*)$", text, flags=re.MULTILINE)
    for line in lines:
        for part in re.split(r"&&|\|\||[;|>]", line):
            words = re.sub("[\"']", "", part).split()
            at = next((number for number, word in enumerate(words) if word.split("/")[-1] == "skipplan"), None)
            if at is not None and words[at + 1 :]:
                yield words[at + 1 :]


def problem(words: list[str]) -> str | None:
    """What is wrong with a command; None when every name and option of it exists."""
    command = COMMAND_LINE
    takes = {option: parameter for parameter in command.params for option in parameter.opts}
    position, path = 0, ""
    while position < len(words):
        word = words[position]
        option = word.split("=")[0]
        position += 1
        if word in PLACEHOLDERS:
            return None
        if word.startswith("--"):
            if option in takes:
                parameter = takes[option]
                if not getattr(parameter, "is_flag", False) and "=" not in word:
                    position += parameter.nargs
            elif option not in GLOBAL_FLAGS:
                return f"`skipplan {path}` has no option {option}"
        elif hasattr(command, "commands"):
            if word not in command.commands:
                return f"`skipplan {path}` has no command {word!r}"
            command, path = command.commands[word], f"{path} {word}".strip()
            takes |= {option: parameter for parameter in command.params for option in parameter.opts}
        elif not any(parameter.param_type_name == "argument" for parameter in command.params):
            return f"`skipplan {path}` takes no argument, but {word!r} is given"
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_shown_commands_exist(page: Path) -> None:
    wrong = [found for words in shown(page.read_text(encoding="utf-8")) if (found := problem(words)) is not None]
    assert wrong == []


def test_the_pages_show_commands() -> None:
    seen = [words for page in PAGES for words in shown(page.read_text(encoding="utf-8"))]
    assert len(seen) > 60
    assert {"run", "best", "export", "report", "dashboard", "init", "validate", "doctor"} <= {
        words[0] for words in seen
    }


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("exprt 7", "no command 'exprt'"),
        ("jobs wach 7", "no command 'wach'"),
        ("export 7 --ouput x", "no option --ouput"),
        ("doctor 7", "takes no argument"),
    ],
)
def test_a_wrong_command_is_found(line: str, expected: str) -> None:
    found = problem(line.split())
    assert found is not None
    assert expected in found
