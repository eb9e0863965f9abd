"""Keep the tokens of the HTTP API: who may read, submit, or do everything.

A token reads ``skipplan_HANDLE_SECRET``. The handle finds its row; of the secret, 256 random bits, only the SHA-256 is
stored.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from storage.database import reads, writes
from storage.errors import InvalidValue, NotFound
from storage.schema import ROLES, AccessTokenRow

LONGEST_TOKEN = 200
_PARTS = re.compile(r"skipplan_([0-9a-f]{16})_([\w-]{43})")
_NAME = re.compile(r"[\w.@-]{1,80}")
_NOBODY = hashlib.sha256(b"no token").hexdigest()


@dataclass(frozen=True)
class Token:
    """A token without its secret."""

    id: int
    name: str
    role: str
    handle: str
    created_at: datetime


def _token(row: AccessTokenRow) -> Token:
    return Token(row.id, row.name, row.role, row.handle, row.created_at)


@writes
def create(session: Session, name: str, role: str) -> tuple[Token, str]:
    """Make a token; it and the text to send, which cannot be read again.

    Raises ``InvalidValue`` for an unknown role, a name that is not a word, or one that is taken.
    """
    if role not in ROLES:
        raise InvalidValue(f"role {role!r}: must be one of {', '.join(ROLES)}")
    if not _NAME.fullmatch(name):
        raise InvalidValue(f"token {name!r}: a name has letters, digits and . _ @ - only, at most 80 of them")
    if session.scalar(select(AccessTokenRow.id).where(AccessTokenRow.name == name)) is not None:
        raise InvalidValue(f"token {name}: there is one of this name; remove it first, or choose another name")
    handle, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    row = AccessTokenRow(name=name, role=role, handle=handle, digest=_digest(secret))
    session.add(row)
    session.flush()
    session.refresh(row)
    return _token(row), f"skipplan_{handle}_{secret}"


@reads
def verify(session: Session, text: str) -> Token | None:
    """Return the token whose text this is; None for any other text, after the same work."""
    parts = _PARTS.fullmatch(text[: LONGEST_TOKEN + 1])
    handle, secret = parts.groups() if parts else ("", "")
    row = session.scalars(select(AccessTokenRow).where(AccessTokenRow.handle == handle)).one_or_none()
    same = hmac.compare_digest(_NOBODY if row is None else row.digest, _digest(secret))
    return _token(row) if row is not None and same else None


@reads
def get(session: Session, handle: str) -> Token | None:
    """Return the token of a handle, which proves nothing about who asks; None when it was removed."""
    row = session.scalars(select(AccessTokenRow).where(AccessTokenRow.handle == handle)).one_or_none()
    return None if row is None else _token(row)


@reads
def list_tokens(session: Session) -> list[Token]:
    """List the tokens by name."""
    return [_token(row) for row in session.scalars(select(AccessTokenRow).order_by(AccessTokenRow.name))]


@writes
def remove(session: Session, name: str) -> None:
    """Make a token void at once; what it submitted stays. Raises ``NotFound``."""
    gone = session.scalars(
        delete(AccessTokenRow).where(AccessTokenRow.name == name).returning(AccessTokenRow.id)
    ).one_or_none()
    if gone is None:
        raise NotFound(f"there is no token {name!r}")


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
