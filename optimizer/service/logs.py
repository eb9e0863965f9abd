"""Write structured logs: one line per event on standard error, as text or as JSON.

An event is a log record whose message is its name; its fields travel in ``extra={"fields": {...}}``. Whatever the
record says, passwords of URLs are taken out before a line is written.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

from workers.text import hide_passwords, one_line

Format = Literal["text", "json"]
FORMATS: tuple[Format, ...] = ("text", "json")
ENVIRONMENT = "SKIPPLAN_LOG"
PACKAGES = ("optimizer", "storage", "workers")

logger = logging.getLogger(__name__)

_job: ContextVar[int | None] = ContextVar("job", default=None)


def log(event: str, **fields: Any) -> None:
    """Log one event, with the job that is worked on."""
    logger.info(event, extra={"fields": fields})


@contextmanager
def of_job(job_id: int) -> Iterator[None]:
    """Mark the events inside with the job's number."""
    token = _job.set(job_id)
    try:
        yield
    finally:
        _job.reset(token)


def configure(form: Format | None, stream: TextIO | None = None) -> None:
    """Write the events of all packages to ``stream`` (standard error) in this format; nowhere when it is None."""
    handler: logging.Handler = logging.NullHandler()
    if form is not None:
        handler = logging.StreamHandler(stream or sys.stderr)
        handler.setFormatter(JsonLines() if form == "json" else TextLines())
        handler.addFilter(_add_job)
    for package in PACKAGES:
        root = logging.getLogger(package)
        root.handlers, root.propagate = [handler], False
        root.setLevel(logging.INFO)


def _add_job(record: logging.LogRecord) -> bool:
    record.job = _job.get()
    return True


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    job = getattr(record, "job", None)
    return ({} if job is None else {"job": job}) | dict(getattr(record, "fields", {}))


class JsonLines(logging.Formatter):
    """Format records as one JSON object a line: ``time`` (UTC), ``level``, ``event``, ``job`` if any, fields."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": moment, "level": record.levelname.lower(), "event": _one_line(record.getMessage())}
        fields = {name: _hidden(value) for name, value in _fields(record).items()}
        return json.dumps(line | fields, default=str)


class TextLines(logging.Formatter):
    """Format records for people: time, event, ``name=value`` for each field."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%d %H:%M:%S")
        pairs = [f"{name}={_shown(_hidden(value))}" for name, value in _fields(record).items()]
        return " ".join([moment, _one_line(record.getMessage()), *pairs])


def _hidden(value: Any) -> Any:
    return value if isinstance(value, int | float | bool) or value is None else _one_line(str(value))


def _one_line(text: str) -> str:
    return one_line(hide_passwords(text))


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value)
    return json.dumps(text) if " " in text or not text else text
