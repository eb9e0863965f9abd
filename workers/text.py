"""What a misspelt name was probably meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(wanted: str, known: Iterable[str]) -> str:
    """``"; did you mean easy-vqa?"`` where a known name is close, else nothing: to be put behind an error message."""
    close = difflib.get_close_matches(wanted.lower(), sorted(known), n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""
