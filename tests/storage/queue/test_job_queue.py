"""The queue's transitions, each allowed and each forbidden one, on both engines."""

from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import text
from storage_builders import claimed, figures, record, record_failure, scene

from storage.errors import InvalidTransition, InvalidValue, JobCancelled, LeaseLost, NotFound
from storage.queue import events, jobs, leases, stages
from storage.records import evaluations, measurements, plans

ENDINGS = {
    "succeeded": leases.finish,
    "infeasible": lambda db, job: leases.infeasible(db, job, "no plan within 1 %"),
    "failed": lambda db, job: leases.fail(db, job, "model not found"),
}


def kinds(db, job_id):
    return [event.kind for event in events.for_job(db, job_id)]


def test_submitted_job_waits_with_its_spec(db):
    spec = {"model": "a", "nested": {"z": [1, 2.5, None, True], "ä": "ü"}}
    before = datetime.now(UTC) - timedelta(seconds=5)
    job = jobs.submit(db, spec, "hash", priority=7)
    assert jobs.get(db, job.id) == job
    assert (job.state, job.spec, job.spec_hash, job.priority) == ("queued", spec, "hash", 7)
    assert (job.owner, job.attempt, job.started_at, job.finished_at, job.error) == (None, 0, None, None, None)
    assert before < job.created_at < datetime.now(UTC) + timedelta(seconds=5)
    assert job.created_at.tzinfo is UTC
    assert kinds(db, job.id) == ["submitted"]


def test_claims_go_by_priority_then_age(db):
    first, urgent, second, late = (jobs.submit(db, {}, str(n), priority=p) for n, p in enumerate([0, 5, 0, -1]))
    order = []
    while (job := leases.claim(db, "me", 60)) is not None:
        order.append(job.id)
    assert order == [urgent.id, first.id, second.id, late.id]


def test_claim_of_one_job_leaves_the_others(db):
    jobs.submit(db, {}, "a", priority=9)
    mine = jobs.submit(db, {}, "b")
    assert leases.claim(db, "me", 60, mine.id).id == mine.id
    assert leases.claim(db, "me", 60, mine.id) is None
    assert jobs.count(db)["queued"] == 1


def test_claimed_job_has_owner_attempt_and_lease(db):
    job = claimed(db, "me", 60)
    assert (job.state, job.owner, job.attempt) == ("running", "me", 1)
    assert job.started_at is not None
    assert timedelta(seconds=59) < job.lease_expires_at - job.started_at <= timedelta(seconds=61)
    assert jobs.get(db, job.id) == job


@pytest.mark.parametrize("state", ENDINGS)
def test_endings(db, state):
    job = claimed(db)
    ended = ENDINGS[state](db, job)
    assert ended == jobs.get(db, job.id)
    assert (ended.state, ended.is_finished, ended.owner, ended.lease_expires_at) == (state, True, None, None)
    assert ended.finished_at >= ended.started_at
    assert (ended.error is None) == (state == "succeeded")
    assert kinds(db, job.id) == ["submitted", "claimed", state]
    assert ENDINGS[state](db, job) == ended, "said twice, as after a lost answer"
    assert kinds(db, job.id) == ["submitted", "claimed", state]


WRITES = {
    **ENDINGS,
    "heartbeat": lambda db, job: leases.heartbeat(db, job, 60),
    "release": leases.release,
    "hold": leases.hold,
    "stage": lambda db, job: stages.record_stage(db, job, "profile", {}),
    "counter": lambda db, job: stages.add_counters(db, job, {"evaluations": 1}),
}


@pytest.mark.parametrize("write", WRITES)
def test_nothing_is_written_for_a_job_that_another_holds(db, write):
    stale = claimed(db, "old", lease_seconds=-1)
    current = leases.claim(db, "new", 60)
    assert (current.id, current.attempt) == (stale.id, 2)
    with pytest.raises(LeaseLost, match=r"no longer held by old \(attempt 1\): it is running by new \(attempt 2\)"):
        WRITES[write](db, stale)
    assert jobs.get(db, current.id) == current
    assert stages.stages(db, current.id) == {} == stages.counters(db, current.id)


@pytest.mark.parametrize("write", WRITES)
def test_same_owner_of_an_earlier_attempt_is_refused(db, write):
    stale = claimed(db, "me", lease_seconds=-1)
    assert leases.claim(db, "me", 60).attempt == 2
    with pytest.raises(LeaseLost):
        WRITES[write](db, stale)


@pytest.mark.parametrize("write", WRITES)
def test_owner_of_a_cancelled_job_is_told(db, write):
    job = claimed(db)
    jobs.cancel(db, job.id)
    with pytest.raises(JobCancelled, match=f"job {job.id} was cancelled"):
        WRITES[write](db, job)


@pytest.mark.parametrize("write", WRITES)
def test_owner_of_a_removed_job_is_told(db, write):
    job = claimed(db)
    jobs.cancel(db, job.id)
    jobs.remove(db, job.id)
    with pytest.raises(JobCancelled, match=f"job {job.id} was removed"):
        WRITES[write](db, job)
    assert jobs.submit(db, {}, "h").id != job.id, "a number never names two jobs"


def test_nothing_of_a_stale_owner_s_measurements_is_written(db):
    stage = scene(db, "old")
    with db.transaction() as session:
        session.execute(text("UPDATE jobs SET owner = 'new', attempt = 2"))
    stale = stage.job
    profile = measurements.ProfileRecord(
        model_id=stage.model_id, task_id=stage.task_id, device="cpu", workload="w", prompt_tokens=1,
        dense_latency_seconds=1.0, layer_seconds={"R": (1.0,)}, relative_error=0.1,
    )  # fmt: skip
    for write in (
        lambda: record(db, stale, plan="RRSS", scores=[1], **stage.samples),
        lambda: record_failure(db, stale, plan="RRSS", reason="x", **stage.samples),
        lambda: plans.publish(db, stale, figures=[figures("RRSS")], group=stage.group),
        lambda: measurements.record_redundancy(
            db, stale, model_id=stage.model_id, task_id=stage.task_id, calibration_hash="c", measurements=[]
        ),
        lambda: measurements.record_profile(db, stale, profile),
    ):
        with pytest.raises(LeaseLost):
            write()
    assert evaluations.for_job(db, stale.id) == [] == plans.list_plans(db)


def test_heartbeat_extends_the_lease_and_says_how_far(db):
    job = claimed(db, lease_seconds=-5)  # late, but nobody else took the job yet
    until = leases.heartbeat(db, job, 60, {"evaluated": 3})
    assert leases.requeue_expired(db) == []
    now = jobs.get(db, job.id)
    assert (now.lease_expires_at, now.progress) == (until, {"evaluated": 3})
    leases.heartbeat(db, job, 60)
    assert jobs.get(db, job.id).progress == {"evaluated": 3}


def test_expired_job_is_claimed_again_until_its_attempts_are_used_up(db):
    submitted = jobs.submit(db, {}, "h", max_attempts=3)
    for attempt in (1, 2, 3):
        job = leases.claim(db, f"driver-{attempt}", -1)
        assert (job.id, job.attempt) == (submitted.id, attempt)
    assert leases.claim(db, "driver-4", 60) is None
    failed = jobs.get(db, submitted.id)
    assert failed.state == "failed"
    assert failed.error == "its process died or hung 3 times, last driver-3; not tried again"
    assert failed.finished_at is not None
    assert kinds(db, submitted.id) == ["submitted", *["claimed", "lease_expired"] * 3]


def test_released_job_waits_again_and_the_attempt_does_not_count(db):
    submitted = jobs.submit(db, {}, "h", max_attempts=1)
    for _ in range(3):
        job = leases.claim(db, "me", 60)
        assert leases.release(db, job, "shutting down").state == "queued"
    assert jobs.get(db, submitted.id).attempt == 3
    assert kinds(db, submitted.id)[-1] == "released"


def test_cancel_of_a_waiting_job(db):
    job = jobs.submit(db, {}, "h")
    cancelled = jobs.cancel(db, job.id, "not needed")
    assert (cancelled.state, cancelled.error) == ("cancelled", "not needed")
    assert cancelled.finished_at is not None
    assert jobs.cancel(db, job.id) == cancelled
    assert leases.claim(db, "me", 60) is None


@pytest.mark.parametrize("state", ENDINGS)
def test_what_cannot_be_cancelled(db, state):
    job = claimed(db)
    ENDINGS[state](db, job)
    with pytest.raises(InvalidTransition, match="nothing to cancel"):
        jobs.cancel(db, job.id)
    assert jobs.get(db, job.id).state == state


def test_resumed_job_has_fresh_attempts_and_keeps_its_stages(db):
    job = claimed(db)
    stages.record_stage(db, job, "profile", {"seconds": [1.5]})
    leases.fail(db, job, "disk full")
    resumed = jobs.resume(db, job.id, max_attempts=1)
    assert (resumed.state, resumed.error, resumed.finished_at) == ("queued", None, None)
    again = leases.claim(db, "other", 60)
    assert (again.id, again.attempt, again.attempt_limit) == (job.id, 2, 2)
    assert again.started_at == job.started_at
    assert stages.stages(db, job.id)["profile"].payload == {"seconds": [1.5]}


@pytest.mark.parametrize("state", ["queued", "running", "succeeded", "infeasible"])
def test_what_cannot_be_resumed(db, state):
    job = jobs.submit(db, {}, "h")
    if state != "queued":
        job = leases.claim(db, "me", 60)
        ENDINGS.get(state, lambda *_: None)(db, job)
    with pytest.raises(InvalidTransition, match="only failed and cancelled jobs"):
        jobs.resume(db, job.id)
    assert jobs.get(db, job.id).state == state


def test_running_job_is_not_removed(db):
    job = claimed(db)
    with pytest.raises(InvalidTransition, match="cancel it first"):
        jobs.remove(db, job.id)
    assert jobs.get(db, job.id) == job


def test_removed_job_takes_all_of_its_own_along_and_leaves_the_rest(db):
    kept, gone = scene(db, "kept"), scene(db, "gone")
    first = record(db, gone.job, plan="RRRS", scores=[1], **gone.samples)
    reused = evaluations.reuse(db, kept.job, first.id)
    plans.publish(db, kept.job, figures=[figures("RRRS", 0.8, 1.2)], group=kept.group)
    plans.publish(db, gone.job, figures=[figures("RSRS", 0.9, 1.4)], group=gone.group)
    stages.record_stage(db, gone.job, "profile", {})
    stages.add_counters(db, gone.job, {"evaluations": 1})
    measurements.record_redundancy(
        db,
        gone.job,
        model_id=gone.model_id,
        task_id=gone.task_id,
        calibration_hash="c",
        measurements=[measurements.Redundancy(0, "all", "cosine", 0.5, None, 3)],
    )
    assert [plan.on_front for plan in plans.for_job(db, kept.job.id)] == [False]
    leases.finish(db, gone.job)
    jobs.remove(db, gone.job.id)
    with pytest.raises(NotFound):
        jobs.get(db, gone.job.id)
    with db.reading() as session:
        for table in ("job_events", "job_stages", "job_counters", "plans", "evaluations"):
            rows = session.execute(text(f"SELECT count(*) FROM {table} WHERE job_id = {gone.job.id}")).scalar()
            assert rows == 0, table
    assert [plan.on_front for plan in plans.for_job(db, kept.job.id)] == [True], "the front is computed anew"
    assert evaluations.for_job(db, kept.job.id)[0].scores == reused.scores
    shared = measurements.redundancy(db, model_id=gone.model_id, task_id=gone.task_id, calibration_hash="c")
    assert len(shared) == 1, "what was measured about a model serves later jobs"


def test_unknown_jobs_are_named(db):
    for call in (jobs.get, jobs.cancel, jobs.resume, jobs.remove):
        with pytest.raises(NotFound, match="there is no job 4711"):
            call(db, 4711)


def test_same_spec_is_found(db):
    assert jobs.find_finished(db, "hash") is None
    job, queued = jobs.submit_once(db, {}, "hash")
    assert queued
    assert jobs.submit_once(db, {}, "hash") == (job, False)
    held = leases.claim(db, "me", 60)
    assert jobs.submit_once(db, {}, "hash") == (held, False)
    assert jobs.find_finished(db, "hash") is None
    done = leases.infeasible(db, held, "no plan")
    assert jobs.submit_once(db, {}, "hash") == (done, False)
    assert jobs.find_finished(db, "hash") == done
    forced = jobs.submit(db, {}, "hash")
    assert forced.id != job.id


def test_failed_and_cancelled_jobs_do_not_stand_in_for_a_new_one(db):
    job = claimed(db)
    leases.fail(db, job, "x")
    again, queued = jobs.submit_once(db, {}, "hash")
    assert queued
    jobs.cancel(db, again.id)
    assert jobs.submit_once(db, {}, "hash")[1]
    assert jobs.find_finished(db, "hash") is None


def test_lists_newest_first_by_state(db):
    ids = [jobs.submit(db, {}, str(n)).id for n in range(5)]
    leases.claim(db, "me", 60)
    assert [job.id for job in jobs.list_jobs(db)] == ids[::-1]
    assert [job.id for job in jobs.list_jobs(db, ["queued"], limit=2)] == [ids[4], ids[3]]
    assert [job.id for job in jobs.list_jobs(db, ["queued", "running"], before=ids[2])] == [ids[1], ids[0]]
    assert jobs.count(db) == {
        "queued": 4,
        "running": 1,
        "succeeded": 0,
        "infeasible": 0,
        "failed": 0,
        "cancelled": 0,
    }
    with pytest.raises(NotFound, match="'done' is no state of a job; the states are queued"):
        jobs.list_jobs(db, ["done"])


def test_history_can_be_followed(db):
    job = claimed(db)
    seen = events.for_job(db, job.id)
    events.add(db, job.id, job.attempt, "worker_died", "worker 3 (node b): out of memory", {"worker": 3})
    (new,) = events.for_job(db, job.id, after=seen[-1].id)
    assert (new.kind, new.attempt, new.data) == ("worker_died", 1, {"worker": 3})
    assert new.at >= seen[-1].at
    assert len(events.for_job(db, job.id, limit=2)) == 2


def test_stages_are_replaced_by_a_later_attempt_and_said_once(db):
    job = claimed(db, "a")
    stages.record_stage(db, job, "profile", {"x": 1})
    stages.record_stage(db, job, "profile", {"x": 1})
    stages.record_stage(db, job, "redundancy", {})
    assert kinds(db, job.id).count("stage_finished") == 2
    leases.release(db, job)
    later = leases.claim(db, "b", 60)
    stages.record_stage(db, later, "profile", {"x": 2})
    recorded = stages.stages(db, job.id)
    assert (recorded["profile"].payload, recorded["profile"].attempt) == ({"x": 2}, 2)
    assert set(recorded) == {"profile", "redundancy"}


def test_counters_add_up(db):
    job = claimed(db)
    stages.add_counters(db, job, {"evaluations": 2, "retries": 1})
    stages.add_counters(db, job, {"evaluations": 3, "layers_saved": 0.5})
    assert stages.counters(db, job.id) == {"evaluations": 5.0, "retries": 1.0, "layers_saved": 0.5}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, object()])
def test_what_json_cannot_hold_is_refused_and_nothing_written(db, value):
    job = claimed(db)
    with pytest.raises(InvalidValue, match="JSON"):
        stages.record_stage(db, job, "profile", {"x": value})
    assert stages.stages(db, job.id) == {}
    with pytest.raises(InvalidValue, match="JSON"):
        jobs.submit(db, {"x": value}, "h")
    assert len(jobs.list_jobs(db)) == 1


def test_steps_of_one_transaction_happen_together(db):
    stage = scene(db)
    with pytest.raises(RuntimeError, match="killed"), db.transaction() as session:
        plans.publish(session, stage.job, figures=[figures("RRSS")], group=stage.group)
        stages.record_stage(session, stage.job, "publish", {})
        raise RuntimeError("killed")
    assert plans.list_plans(db) == []
    assert stages.stages(db, stage.job.id) == {}
