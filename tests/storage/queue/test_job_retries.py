"""Attempts that failed for their surroundings: how long a job waits, and when it is given up."""

from datetime import UTC, datetime, timedelta

import pytest
from storage_builders import claimed, record, record_failure, scene

from storage.queue import attempts, events, jobs, leases, stages
from storage.records import evaluations


def evaluate(db, stage, plan):
    return record(db, stage.job, plan=plan, scores=(1.0,), **stage.samples)


def test_a_job_is_not_taken_before_its_time_unless_asked_for(db):
    job = claimed(db)
    waiting = leases.retry(db, job, "node lost", 3600)
    assert (waiting.state, waiting.owner, waiting.error) == ("queued", None, None)
    assert waiting.not_before - datetime.now(UTC) > timedelta(minutes=50)
    assert leases.claim(db, "me", 60) is None
    asked = leases.claim(db, "me", 60, job.id)
    assert (asked.id, asked.attempt, asked.not_before) == (job.id, 2, None)


def test_a_job_is_taken_once_its_time_has_come(db):
    job = claimed(db)
    leases.retry(db, job, "node lost", 0)
    assert leases.claim(db, "me", 60).id == job.id
    assert events.for_job(db, job.id)[2].message == "node lost; queued again, not before 0 s from now"


def test_attempts_that_get_nowhere_are_counted_and_the_last_one_fails_the_job(db):
    submitted = jobs.submit(db, {}, "h", max_attempts=3)
    for attempt in (1, 2, 3):
        job = leases.claim(db, "me", 60)
        assert job.attempt == attempt
        ended = leases.retry(db, job, "no cluster", 0)
    assert (ended.state, ended.error) == ("failed", "no cluster (attempt 3, the last one)")
    assert jobs.get(db, submitted.id).finished_at is not None
    assert leases.retry(db, job, "no cluster", 0) == ended, "said twice, as after a lost answer"


@pytest.mark.parametrize("how", ["evaluation", "stage"])
@pytest.mark.parametrize("end", ["retry", "lease"])
def test_an_attempt_that_got_somewhere_does_not_count(db, how, end):
    first = scene(db)
    job = first.job
    assert job.attempt_limit == jobs.MAX_ATTEMPTS
    for number in range(3):
        stage = type(first)(job, first.model_id, first.task_id, first.device_id)
        if how == "evaluation":
            evaluate(db, stage, f"R{'S' * number}")
        else:
            stages.record_stage(db, job, f"stage {number}", {"value": number})
        if end == "retry":
            leases.retry(db, job, "node lost", 0)
        else:
            leases.heartbeat(db, job, -1)
        job = leases.claim(db, "me", 60)
        assert (job.attempt, job.attempt_limit) == (number + 2, jobs.MAX_ATTEMPTS + number + 1)


def test_what_was_not_run_is_no_headway(db):
    """Taking over what is known, and recording that nothing could be measured, must not keep a job alive for ever."""
    first = scene(db)
    known = evaluate(db, first, "RS")
    leases.finish(db, first.job)
    second = scene(db)
    evaluations.reuse(db, second.job, known.id)
    record_failure(db, second.job, plan="SS", reason="killed", **second.samples)
    leases.retry(db, second.job, "node lost", 0)
    assert leases.claim(db, "me", 60).attempt_limit == jobs.MAX_ATTEMPTS


def test_a_resumed_job_need_not_wait(db):
    job = claimed(db)
    leases.retry(db, job, "node lost", 3600)
    jobs.cancel(db, job.id)
    jobs.resume(db, job.id)
    assert leases.claim(db, "me", 60).id == job.id


def test_retries_in_a_row_are_counted_until_something_else_happens(db):
    job = claimed(db)
    assert attempts.retries_in_a_row(db, job.id) == 0
    for number in (1, 2):
        leases.retry(db, job, "no cluster", 0)
        assert attempts.retries_in_a_row(db, job.id) == number
        job = leases.claim(db, "me", 60)
    stages.record_stage(db, job, "redundancy", {})
    assert attempts.retries_in_a_row(db, job.id) == 0


def lose(db, job, kind="cluster_lost", most=3):
    return leases.put_off(db, job, kind, "node lost", 0, most)


def test_what_is_put_off_is_not_counted_until_it_happens_too_often_in_a_row(db):
    submitted = jobs.submit(db, {}, "h", max_attempts=1)
    for number in (1, 2):
        ended = lose(db, leases.claim(db, "me", 60))
        assert (ended.state, ended.attempt, ended.attempt_limit) == ("queued", number, number + 1)
    ended = lose(db, leases.claim(db, "me", 60))
    assert (ended.state, ended.error) == ("failed", "node lost (3 times in a row, with nothing recorded in between)")
    assert jobs.get(db, submitted.id).finished_at is not None


@pytest.mark.parametrize("how", ["evaluation", "stage"])
def test_what_was_recorded_ends_the_row(db, how):
    first = scene(db)
    job = first.job
    for number in range(8):
        if number % 2:
            stage = type(first)(job, first.model_id, first.task_id, first.device_id)
            if how == "evaluation":
                evaluate(db, stage, f"R{'S' * number}")
            else:
                stages.record_stage(db, job, f"stage {number}", {"value": number})
        assert lose(db, job).state == "queued"
        job = leases.claim(db, "me", 60)


def test_a_cluster_that_is_away_between_losses_does_not_make_more_of_them_nor_fewer(db):
    job = claimed(db)
    for kind in ("cluster_lost", "cluster_away", "cluster_away", "cluster_lost", "cluster_away"):
        assert lose(db, job, kind, most=4 if kind == "cluster_away" else 3).state == "queued"
        job = leases.claim(db, "me", 60)
    assert lose(db, job).state == "failed"  # the third loss
