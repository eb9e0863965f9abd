"""Tokens and submissions on both engines: hashed secrets, and keys that hold under concurrent requests."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import text

from storage.errors import InvalidTransition, InvalidValue, KeyReused, NotFound
from storage.queue import events, jobs, leases, submissions, tokens
from storage.queue.submissions import Request, Wanted

WANTED = Wanted({"model": {"path": "m"}}, "hash", priority=0, max_attempts=5)


def rows(db, statement):
    with db.reading() as session:
        return [tuple(row) for row in session.execute(text(statement))]


def test_a_token_is_told_once_and_kept_as_a_hash(db):
    token, told = tokens.create(db, "ci", "submit")
    assert re.fullmatch(r"skipplan_[0-9a-f]{16}_[\w-]{43}", told)
    assert tokens.verify(db, told) == token
    secret = told.split("_", 2)[2]
    assert secret not in str(rows(db, "SELECT * FROM access_tokens"))
    assert [(each.name, each.role) for each in tokens.list_tokens(db)] == [("ci", "submit")]


@pytest.mark.parametrize(
    "change",
    [
        lambda told: "",
        lambda told: told[:-1],
        lambda told: told + "x",
        lambda told: told[:-1] + ("A" if told[-1] != "A" else "B"),
        lambda told: told.replace("skipplan_", "skipplan_0", 1),
        lambda told: "x" * 100_000,
        lambda told: told.upper(),
    ],
)
def test_any_other_text_is_no_token(db, change):
    _, told = tokens.create(db, "ci", "admin")
    assert tokens.verify(db, change(told)) is None


def test_a_removed_token_is_void_and_its_name_free(db):
    _, told = tokens.create(db, "ci", "read")
    tokens.remove(db, "ci")
    assert tokens.verify(db, told) is None
    with pytest.raises(NotFound, match="'ci'"):
        tokens.remove(db, "ci")
    tokens.create(db, "ci", "admin")


@pytest.mark.parametrize(("name", "role"), [("ci", "read"), ("two words", "read"), ("", "read"), ("other", "root")])
def test_tokens_that_cannot_be(db, name, role):
    tokens.create(db, "ci", "read")
    with pytest.raises(InvalidValue):
        tokens.create(db, name, role)


def test_concurrent_requests_with_one_key_queue_one_job(db):
    token, _ = tokens.create(db, "ci", "submit")
    request = Request("content", key="one")
    anew = Wanted(WANTED.spec, "hash", 0, 5, anew=True)  # so that nothing but the key keeps a second one out
    with ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(lambda _: submissions.submit(db, token, request, anew), range(48)))
    assert len({job.id for job, _ in answers}) == 1
    assert sum(new for _, new in answers) == 1
    assert rows(db, "SELECT count(*) FROM jobs") == [(1,)]


def test_keys_are_each_token_s_own_and_requests_without_one_are_not_held_together(db):
    first, second = tokens.create(db, "a", "submit")[0], tokens.create(db, "b", "submit")[0]
    anew = Wanted(WANTED.spec, "hash", 0, 5, anew=True)
    keyed = [submissions.submit(db, token, Request("content", "k"), anew)[0].id for token in (first, second, first)]
    assert keyed[0] == keyed[2] != keyed[1]
    free = [submissions.submit(db, first, Request("content"), anew)[0].id for _ in range(2)]
    assert len({*keyed, *free}) == 4


def test_a_key_stands_for_its_request_alone(db):
    token, _ = tokens.create(db, "ci", "submit")
    submissions.submit(db, token, Request("content", "k"), WANTED)
    with pytest.raises(KeyReused, match="'k' was used for another request"):
        submissions.submit(db, token, Request("other content", "k"), WANTED)
    assert submissions.known_job(db, token, Request("content", "k")) is not None
    assert submissions.known_job(db, token, Request("content", "new")) is None


def test_who_queued_a_job_owns_it(db):
    first, second = tokens.create(db, "a", "submit")[0], tokens.create(db, "b", "submit")[0]
    job, new = submissions.submit(db, first, Request("content"), WANTED)
    same, again = submissions.submit(db, second, Request("content"), WANTED)
    assert (same.id, new, again) == (job.id, True, False)
    assert submissions.is_owner(db, first, job.id)
    assert not submissions.is_owner(db, second, job.id)
    assert [event.message for event in events.for_job(db, job.id)][-1] == "by token a"
    tokens.remove(db, "a")
    newest, _ = tokens.create(db, "a", "submit")
    assert not submissions.is_owner(db, newest, job.id)
    jobs.remove(db, job.id)
    assert rows(db, "SELECT count(*) FROM submissions") == [(0,)]


def test_a_priority_is_changed_until_the_job_ends(db):
    first, second = (jobs.submit(db, {}, f"hash {n}") for n in range(2))
    assert jobs.prioritize(db, second.id, 7).priority == 7
    claimed = leases.claim(db, "me", 60)
    assert claimed is not None and claimed.id == second.id
    jobs.cancel(db, first.id)
    with pytest.raises(InvalidTransition, match="is cancelled"):
        jobs.prioritize(db, first.id, 1)
