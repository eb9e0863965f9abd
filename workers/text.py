"""Word messages: errors and program output as one line, and a suggestion for a misspelt name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from workers.errors import WorkersError


def one_line(text: object) -> str:
    """Fold all white space, line breaks included, into single spaces; an empty error gives the name of its type."""
    folded = " ".join(str(text).split())
    return type(text).__name__ if not folded and isinstance(text, BaseException) else folded


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that is not blank, or the name of its type."""
    return next(iter(_lines(str(error))), type(error).__name__)


def last_line(text: str, otherwise: str) -> str:
    """Return the last line of a program's output that is not blank."""
    return next(reversed(_lines(text)), otherwise)


def describe_error(error: BaseException, own: type[BaseException] = WorkersError) -> str:
    """Describe an error in one line; those of type ``own`` are written for people and need no name of their type."""
    return one_line(error) if isinstance(error, own) else f"{type(error).__name__}: {' '.join(str(error).split())}"


def did_you_mean(wanted: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean easy-vqa?"`` where a known name is close, else nothing: it follows an error message."""
    close = difflib.get_close_matches(wanted.lower(), sorted(known), n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


_IN_AUTHORITY = re.compile(r"(?P<start>[\w+.-]+://[^\s:/@]*):\S*@")
"""To the last ``@``: a password that was not quoted for a URL may hold slashes and the like, and databases take it."""

_AMONG_OPTIONS = re.compile(r"(?P<start>\b(?:password|sslpassword|passfile|sslkey)=)[^\s&'\"]+", re.IGNORECASE)


def hide_passwords(text: str) -> str:
    """Take the passwords of URLs out of a text."""
    return _AMONG_OPTIONS.sub(r"\g<start>***", _IN_AUTHORITY.sub(r"\g<start>:***@", text))
