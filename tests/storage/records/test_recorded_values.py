"""What is recorded reads back as it was, on both engines; recording it again changes nothing."""

import math
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text
from storage_builders import claimed, model, record, record_failure, scene, task, task_record

from storage.errors import InvalidValue, LeaseLost, NotFound
from storage.queue import jobs, leases, stages
from storage.records import evaluations, lookup, measurements, overview, scores
from storage.records.evaluations import EvaluationRecord
from storage.records.lookup import ModelRecord
from storage.schema import JobEventRow

shared_db = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
unit = st.floats(0, 1)


@given(sample_scores=st.lists(st.sampled_from([0, 1, 0.0, 1.0, True, False])) | st.lists(unit))
def test_scores_come_back_exactly(sample_scores):
    packed = scores.pack(sample_scores)
    assert scores.unpack(packed, len(sample_scores)) == tuple(map(float, sample_scores))


@given(sample_scores=st.lists(unit | st.just(math.nan)))
def test_scores_of_failed_samples_come_back_as_nan(sample_scores):
    found = scores.unpack(scores.pack(sample_scores), len(sample_scores))
    assert str(found) == str(tuple(map(float, sample_scores)))


@given(st.lists(st.sampled_from([0, 1])))
def test_right_and_wrong_take_a_bit_a_sample(sample_scores):
    assert len(scores.pack(sample_scores)) == 1 + math.ceil(len(sample_scores) / 8)


@pytest.mark.parametrize("score", [-0.1, 1.1, math.inf, -math.inf])
def test_scores_that_are_none(score):
    with pytest.raises(InvalidValue, match="of sample 2 is outside"):
        scores.pack([1, 0, score])


@pytest.mark.parametrize(
    ("data", "n"), [(b"", 0), (b"\x01", 1), (b"\x01ab", 8), (b"\x02" + b"x" * 8, 2), (b"\x07x", 1)]
)
def test_bytes_that_are_no_scores(data, n):
    with pytest.raises(InvalidValue, match="do not hold the scores"):
        scores.unpack(data, n)


@shared_db
@given(spec=st.dictionaries(st.text(), json_values, max_size=4))
def test_spec_comes_back(db, spec):
    job = jobs.submit(db, spec, "h")
    assert job.spec == spec == jobs.get(db, job.id).spec
    assert list(job.spec) == list(spec), "in its order"


@shared_db
@given(message=st.text(st.characters(codec=None)))
def test_any_message_can_be_stored(db, message):
    """Also what a crashed process printed: NUL characters, lone surrogates."""
    job = claimed(db)
    failed = leases.fail(db, job, message)
    stored = jobs.get(db, job.id).error
    assert failed.error == stored
    assert len(stored) <= len(message)
    if message.isprintable():
        assert stored == message


moments = st.datetimes(
    min_value=datetime(1970, 1, 2), max_value=datetime(2200, 1, 1), timezones=st.sampled_from(
        [UTC, timezone(timedelta(hours=5, minutes=45)), timezone(timedelta(hours=-11))]
    )
)  # fmt: skip


@shared_db
@given(moment=moments)
def test_times_come_back_as_the_same_moment_in_utc(db, moment):
    job = claimed(db)
    with db.transaction() as session:
        row = JobEventRow(job_id=job.id, at=moment, attempt=1, kind="x", message="", data={})
        session.add(row)
        session.flush()
        event_id = row.id
    with db.reading() as session:
        stored = session.get(JobEventRow, event_id).at
    assert stored == moment
    assert stored.tzinfo is UTC


def test_time_without_a_zone_is_refused(db):
    job = claimed(db)
    with pytest.raises(InvalidValue, match="has no zone"), db.transaction() as session:
        session.add(JobEventRow(job_id=job.id, at=datetime(2026, 1, 1), attempt=1, kind="x", message="", data={}))


def test_database_time_is_now_whatever_the_session_s_zone(db):
    with db.transaction() as session:
        if db.dialect == "postgresql":
            session.execute(text("SET LOCAL TIME ZONE 'Asia/Tokyo'"))
        job = jobs.submit(session, {}, "h")
    assert abs(job.created_at - datetime.now(UTC)) < timedelta(seconds=10)


@shared_db
@given(
    sample_scores=st.lists(unit, min_size=1, max_size=20),
    seconds=st.floats(0, 1e6),
    secondary=st.dictionaries(st.text(), st.floats(allow_nan=False, allow_infinity=False), max_size=3),
    number=st.integers(0, 10**9),
)
def test_evaluation_comes_back(db, sample_scores, seconds, secondary, number):
    stage = scene(db, f"driver-{number}")
    recorded = record(
        db,
        stage.job,
        plan="RFBS",
        scores=sample_scores,
        result={"seconds": seconds, "secondary": secondary},
        compensation="linear:ridge=0.1",
        settings="bfloat16 sdpa",
        **stage.samples,
    )
    assert recorded.scores == tuple(sample_scores)
    assert recorded.accuracy == math.fsum(sample_scores) / len(sample_scores)
    assert (recorded.seconds, recorded.secondary, recorded.n_samples) == (seconds, secondary, len(sample_scores))
    assert evaluations.for_job(db, stage.job.id) == [recorded]


def test_recorded_again_the_first_stays(db):
    stage = scene(db)
    first = record(db, stage.job, plan="RRSS", scores=[1, 0], result={"seconds": 2.0}, **stage.samples)
    again = record(db, stage.job, plan="RRSS", scores=[1, 1], **stage.samples)
    failed = record_failure(db, stage.job, plan="RRSS", reason="late", n_samples=2, **stage.samples)
    assert first == again == failed
    assert evaluations.for_job(db, stage.job.id) == [first]


def test_scores_replace_a_recorded_failure(db):
    stage = scene(db)
    failed = record_failure(db, stage.job, plan="RRSS", reason="killed its worker twice", **stage.samples)
    assert (failed.failure, failed.accuracy, failed.scores) == ("killed its worker twice", None, ())
    scored = record(db, stage.job, plan="RRSS", scores=[1], **stage.samples)
    assert (scored.id, scored.failure, scored.accuracy) == (failed.id, None, 1.0)


@pytest.mark.parametrize(
    "change", [{"plan": "RSSS"}, {"compensation": "linear"}, {"split": "held_out"}, {"scores": [0, 0]}]
)
def test_what_makes_an_evaluation_another_one(db, change):
    stage = scene(db)
    same = {"plan": "RRSS", "compensation": "none", **stage.samples}
    record(db, stage.job, scores=[1], **same)
    record(db, stage.job, **{"scores": [0], **same, **change})
    assert [each.accuracy for each in evaluations.for_job(db, stage.job.id)] == [1.0, 0.0]


def test_same_number_of_other_samples_is_refused(db):
    stage = scene(db)
    record(db, stage.job, plan="RRSS", scores=[1], **stage.samples)
    with pytest.raises(InvalidValue, match="of other samples"):
        record(db, stage.job, plan="RRSS", scores=[1], **{**stage.samples, "split_hash": "s2"})


def test_failed_samples_are_left_out_of_the_accuracy_and_not_taken_over_by_other_jobs(db):
    stage = scene(db)
    stored = record(db, stage.job, plan="RRSS", scores=[1, math.nan, 0, 1], **stage.samples)
    assert stored.accuracy == 2 / 3 and stored.n_samples == 4 and math.isnan(stored.scores[1])
    key = {name: stage.samples[name] for name in ("model_id", "task_id", "split_hash")}
    assert evaluations.known(db, **key) == []
    assert [each.plan for each in evaluations.for_job(db, stage.job.id)] == ["RRSS"]


def test_evaluation_without_scores_or_with_impossible_ones(db):
    stage = scene(db)
    wrong_ones = ([], "has no scores"), ([2.0], "outside"), ([math.nan], "every sample failed")
    for wrong, message in wrong_ones:
        with pytest.raises(InvalidValue, match=message):
            record(db, stage.job, plan="RRSS", scores=wrong, **stage.samples)
    with pytest.raises(InvalidValue, match="nan cannot be stored"):
        record(db, stage.job, plan="RRSS", scores=[1], result={"seconds": math.nan}, **stage.samples)
    with pytest.raises(InvalidValue, match="on 2 samples has 1 scores"):
        record(db, stage.job, plan="RRSS", scores=[1], n_samples=2, **stage.samples)
    assert evaluations.for_job(db, stage.job.id) == []


def test_later_job_finds_and_reuses_what_an_earlier_one_measured(db):
    earlier, later = scene(db, "a"), scene(db, "b")
    key = {"model_id": earlier.model_id, "task_id": earlier.task_id, "split_hash": "s1"}
    measured = record(db, earlier.job, plan="RRSS", scores=[1, 0], result={"seconds": 3.0}, **earlier.samples)
    record_failure(db, earlier.job, plan="RSSS", reason="out of memory", **earlier.samples)
    assert evaluations.known(db, **key) == [measured]
    for other in ({"settings": "float16"}, {"split_hash": "s2"}, {"model_id": earlier.model_id + 1}):
        assert evaluations.known(db, **(key | other)) == [], other
    reused = evaluations.reuse(db, later.job, measured.id)
    assert (reused.job_id, reused.scores, reused.seconds) == (later.job.id, measured.scores, 0.0)
    assert reused.reused_from == measured.id
    assert evaluations.reuse(db, later.job, measured.id) == reused
    assert evaluations.known(db, **key) == [measured], "measured once, however often it is used"
    with pytest.raises(NotFound, match="no successful evaluation 1000000000"):
        evaluations.reuse(db, later.job, 1_000_000_000)
    jobs.cancel(db, later.job.id)
    with pytest.raises(LeaseLost):
        evaluations.reuse(db, later.job, measured.id)


def test_for_job_can_be_narrowed_to_a_split(db):
    stage = scene(db)
    for split in ("search", "held_out"):
        record(db, stage.job, plan="RRSS", scores=[1], **{**stage.samples, "split": split})
    assert [each.split for each in evaluations.for_job(db, stage.job.id, "held_out")] == ["held_out"]


def test_models_tasks_and_devices_are_known_once(db):
    assert model(db) == model(db)
    assert model(db, fingerprint="other") != model(db)
    assert task(db) == task(db)
    assert task(db, task_hash="d2") != task(db)
    assert lookup.ensure_device(db, "cpu") == lookup.ensure_device(db, "cpu")


def test_model_is_found_by_any_of_its_names(db):
    first = model(db, "hub/llava-7b", "aaaa1111")
    assert model(db, "/data/llava/", "aaaa1111") == first
    second = model(db, "hub/qwen", "aaaa2222")
    for typed in ("hub/llava-7b", "llava-7b", "/data/llava/", "/data/llava", "llava", "aaaa1111", "aaaa11"):
        assert lookup.find_model(db, typed) == first, typed
    assert lookup.find_model(db, "qwen") == second
    for typed, hint in (
        ("aaaa", "no model 'aaaa'"),
        ("aa", "no model"),
        ("llava-7", "did you mean .*llava-7b"),
        ("%", "no"),
    ):
        with pytest.raises(NotFound, match=hint):
            lookup.find_model(db, typed)


def test_name_means_the_model_last_loaded_under_it(db):
    old = model(db, "models/mine", "aaaa1111")
    new = model(db, "models/mine", "bbbb2222")
    assert lookup.find_model(db, "mine") == new
    time.sleep(0.005)  # SQLite's clock ticks in milliseconds
    assert model(db, "models/mine", "aaaa1111") == old
    assert lookup.find_model(db, "models/mine") == old


def test_revision_tells_models_of_one_name_apart(db):
    ids = {
        revision: lookup.ensure_model(
            db,
            ModelRecord(name="hub/m", fingerprint=revision * 8, family="llava", num_layers=2, parameters=1),
            revision,
        )
        for revision in ("a", "b")
    }
    assert {revision: lookup.find_model(db, "hub/m", revision) for revision in ids} == ids
    with pytest.raises(NotFound, match="no model 'hub/m' at revision c"):
        lookup.find_model(db, "hub/m", "c")


def test_unknown_tasks_and_devices_are_named_with_what_there_is(db):
    with pytest.raises(NotFound, match="no task 'easy-vqa' in the database; there are none yet"):
        lookup.find_tasks(db, "easy-vqa")
    scene(db)
    with pytest.raises(NotFound, match=r"did you mean easy-vqa\?"):
        lookup.find_tasks(db, "easy_vqa")
    with pytest.raises(NotFound, match="there are cpu: test, 1 thread"):
        lookup.find_devices(db, "H100")


def test_device_is_found_by_part_of_its_name(db):
    ids = [lookup.ensure_device(db, name) for name in ("NVIDIA H100", "NVIDIA A10", "cpu", "cpu 2")]
    assert lookup.find_devices(db, "nvidia") == ids[:2]
    assert lookup.find_devices(db, "cpu") == [ids[2]], "a whole name means that one alone"
    with pytest.raises(NotFound):
        lookup.find_devices(db, "_")


def test_latency_profiles_are_kept_per_job_and_the_latest_found(db):
    one, two = scene(db, "a"), scene(db, "b")

    def profile(seconds, workload="batch=1 new=4"):
        return measurements.ProfileRecord(
            model_id=one.model_id,
            task_id=one.task_id,
            device="cpu: test, 1 thread",
            workload=workload,
            prompt_tokens=70,
            dense_latency_seconds=seconds,
            layer_seconds={"R": (0.25, 0.5), "S": (0.0, 1e-9)},
            relative_error=0.03,
            phases={"prefill": {"R": [0.25, 0.5]}},
        )

    measurements.record_profile(db, one.job, profile(1.0))
    measurements.record_profile(db, one.job, profile(2.0))
    measurements.record_profile(db, two.job, profile(3.0))
    measurements.record_profile(db, two.job, profile(4.0, workload="batch=8 new=4"))
    latest = measurements.profile_of_job(db, two.job.id)
    assert latest == replace(profile(4.0, workload="batch=8 new=4"), measured_at=latest.measured_at)
    assert measurements.profile_of_job(db, one.job.id).dense_latency_seconds == 2.0
    assert measurements.profile_of_job(db, 4711) is None
    with db.reading() as session:
        assert session.execute(text("SELECT count(*) FROM latency_profiles")).scalar() == 3


def test_redundancy_is_shared_by_jobs_and_measured_again_replaces(db):
    one, two = scene(db, "a"), scene(db, "b")
    key = {"model_id": one.model_id, "task_id": one.task_id, "calibration_hash": "c1"}
    first = [
        measurements.Redundancy(layer, group, name, layer / 7, 0.01, 10**10)
        for name in ("cka", "cosine")
        for group in ("text", "vision")
        for layer in range(3)
    ]
    measurements.record_redundancy(db, one.job, **key, measurements=first)
    assert measurements.redundancy(db, **key) == first
    assert measurements.redundancy(db, **{**key, "calibration_hash": "c2"}) == []
    assert measurements.redundancy(db, **key, names=["cka"]) == first[:6]
    again = measurements.Redundancy(1, "text", "cka", 0.5, None, 20)
    measurements.record_redundancy(db, two.job, **key, measurements=[again])
    assert measurements.redundancy(db, **key) == [first[0], again, *first[2:]]
    frame = overview.frame(measurements.redundancy(db, **key), measurements.Redundancy)
    assert len(frame) == 12
    assert frame.pivot(index=["name", "token_group"], columns="layer", values="value").loc[("cka", "text"), 1] == 0.5


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_measurement_that_is_no_number_is_refused(db, value):
    stage = scene(db)
    with pytest.raises(InvalidValue, match="cannot be stored as a measurement"):
        measurements.record_redundancy(
            db,
            stage.job,
            model_id=stage.model_id,
            task_id=stage.task_id,
            calibration_hash="c",
            measurements=[measurements.Redundancy(0, "all", "cka", value, None, 1)],
        )


@shared_db
@given(payload=st.dictionaries(st.text(), json_values, max_size=4))
def test_stage_payload_comes_back(db, payload):
    job = claimed(db)
    stages.record_stage(db, job, "search", payload)
    assert stages.stages(db, job.id)["search"].payload == payload


def test_evaluations_as_a_frame(db):
    stage = scene(db)
    empty = overview.frame(evaluations.for_job(db, stage.job.id), EvaluationRecord)
    assert len(empty) == 0
    record(db, stage.job, plan="RRSS", scores=[1, 0], result={"seconds": 2.0}, **stage.samples)
    record_failure(db, stage.job, plan="SSSS", reason="x", **stage.samples)
    frame = overview.frame(evaluations.for_job(db, stage.job.id), EvaluationRecord)
    assert list(frame.columns) == list(empty.columns)
    assert frame["plan"].tolist() == ["RRSS", "SSSS"]
    assert frame["accuracy"].iloc[0] == 0.5
    assert math.isnan(frame["accuracy"].iloc[1])
    assert str(frame["recorded_at"].dt.tz) == "UTC"


def test_models_and_tasks_are_read_as_they_were_given(db):
    stage = scene(db)
    assert lookup.model(db, stage.model_id) == ModelRecord(
        name="models/tiny", fingerprint="f1e2d3c4", family="llava", num_layers=4, parameters=10**9
    )
    assert lookup.task(db, stage.task_id) == task_record()
    for read, kind in ((lookup.model, "model"), (lookup.task, "task")):
        with pytest.raises(NotFound, match=f"there is no {kind} 4711"):
            read(db, 4711)
