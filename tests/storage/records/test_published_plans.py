"""Published plans: fronts against brute force, queries against pandas."""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from storage_builders import Scene, claimed, figures, model, scene, task

from storage import pareto, schema
from storage.errors import InvalidValue, NotFound
from storage.pareto import Point
from storage.queue import jobs, leases
from storage.records import lookup, overview, plans
from storage.records.plans import Plan, PlanFigures, PlanQuery

shared_db = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

coarse = st.integers(0, 4).map(lambda n: n / 4)  # few values, so that there are ties
points = st.lists(st.tuples(coarse, coarse, coarse, coarse), max_size=14).map(
    lambda rows: [Point(n, 1 + a, b, -c, 1 + d) for n, (a, b, c, d) in enumerate(rows)]
)


def dominates(one, other):
    """By the definition: nowhere worse, somewhere better, in accuracy and speed-up."""
    return (
        one.accuracy >= other.accuracy
        and one.speedup >= other.speedup
        and (one.accuracy > other.accuracy or one.speedup > other.speedup)
    )


def covers(one, other):
    """``one`` meets every constraint that ``other`` meets."""
    return (
        one.speedup >= other.speedup
        and one.accuracy >= other.accuracy
        and one.difference_low >= other.difference_low
        and one.latency_seconds <= other.latency_seconds
    )


@given(points)
def test_front_is_what_nothing_dominates(cloud):
    assert pareto.front(cloud) == {p.id for p in cloud if not any(dominates(q, p) for q in cloud)}


@given(points)
def test_contenders_cover_everything_and_none_is_spare(cloud):
    members = [p for p in cloud if p.id in pareto.contenders(cloud)]
    assert all(any(covers(m, p) for m in members) for p in cloud)
    assert not any(covers(a, b) for a, b in itertools.permutations(members, 2))


@given(points, st.permutations(range(14)))
def test_order_of_the_points_does_not_matter(cloud, order):
    shuffled = [cloud[n] for n in order if n < len(cloud)]
    assert pareto.front(shuffled) == pareto.front(cloud)
    assert pareto.contenders(shuffled) == pareto.contenders(cloud)


def flags(db):
    with db.reading() as session:
        rows = session.query(schema.PlanRow).all()
        return [
            (
                (row.model_id, row.task_id, row.device_id, row.workload),
                Point(row.id, row.speedup, row.accuracy, row.difference_low, row.latency_seconds),
                row.on_front,
                row.contender,
            )
            for row in rows
        ]


def assert_flags_are_right(db):
    found = flags(db)
    for group, point, on_front, contender in found:
        rivals = [other for its_group, other, *_ in found if its_group == group]
        assert on_front == (not any(dominates(rival, point) for rival in rivals))
        beaten = any(covers(rival, point) and (not covers(point, rival) or rival.id < point.id) for rival in rivals)
        assert contender == (not beaten)


random_figures = st.builds(
    lambda plan, accuracy, speed, slack, seconds: figures(
        plan,
        accuracy,
        speed,
        difference_low=accuracy - 0.95 - slack,
        latency_seconds=seconds,
    ),
    st.text("RFBS", min_size=4, max_size=4),
    st.integers(0, 10).map(lambda n: n / 10),
    st.integers(4, 12).map(lambda n: n / 4),
    st.sampled_from([0.0, 0.01, 0.1]),
    st.integers(1, 5).map(lambda n: n / 10),
)
batches = st.lists(st.lists(random_figures, max_size=6, unique_by=lambda f: f.plan), min_size=1, max_size=4)


@shared_db
@given(batches=batches, groups=st.lists(st.integers(0, 1), min_size=4, max_size=4), removed=st.integers(0, 3))
def test_membership_stays_right_through_publishing_and_removing(db, batches, groups, removed):
    base = scene(db)
    every_job = []
    for batch, group in zip(batches, groups, strict=False):
        stage = replace(base, job=claimed(db, "d"), workload=f"workload {group}")
        every_job.append(stage.job)
        published = plans.publish(db, stage.job, figures=batch, group=stage.group)
        assert [each.plan for each in published] == [each.plan for each in batch]
        leases.finish(db, stage.job)
    assert_flags_are_right(db)
    jobs.remove(db, every_job[removed % len(every_job)].id)
    assert_flags_are_right(db)
    leases.fail(db, base.job, "done")
    for job in jobs.list_jobs(db, limit=None):
        jobs.remove(db, job.id)
    assert plans.list_plans(db) == []


def test_published_plan_comes_back(db):
    stage = scene(db)
    given_figures = figures("RFBS", compensation="linear", secondary={"f1": 0.5, "by length": [1, 2]})
    (published,) = plans.publish(db, stage.job, figures=[given_figures], group=stage.group)
    assert plans.get(db, published.id) == published
    for name in [each.name for each in fields(PlanFigures)]:
        assert getattr(published, name) == getattr(given_figures, name)
    assert (published.model, published.fingerprint, published.task) == ("models/tiny", "f1e2d3c4", "easy-vqa")
    assert (published.device, published.workload) == ("cpu: test, 1 thread", stage.workload)
    assert (published.job_id, published.origin, published.on_front) == (stage.job.id, "measured", True)
    with pytest.raises(NotFound, match="there is no plan 99999"):
        plans.get(db, 99999)


def test_plan_published_again_by_its_job_takes_the_new_figures(db):
    stage = scene(db)
    (first, beaten) = plans.publish(
        db, stage.job, figures=[figures("RRSS", 0.9, 2.0), figures("RSRS", 0.8, 1.5)], group=stage.group
    )
    assert (first.on_front, beaten.on_front) == (True, False)
    (again,) = plans.publish(db, stage.job, figures=[figures("RRSS", 0.7, 1.2)], group=stage.group)
    assert (again.id, again.accuracy) == (first.id, 0.7)
    assert [each.plan for each in plans.list_plans(db, PlanQuery(on_front=True))] == ["RSRS"], "what it beat is back"
    assert_flags_are_right(db)


def test_groups_do_not_compete(db):
    stage = scene(db)
    others = [
        replace(stage, workload="batch=8 new=4"),
        replace(stage, task_id=task(db, "captions")),
        replace(stage, device_id=lookup.ensure_device(db, "gpu")),
        replace(stage, model_id=model(db, "other", "0123456789")),
    ]
    for number, each in enumerate([stage, *others]):
        plans.publish(db, stage.job, figures=[figures("RRSS", 0.5 + number / 10, 1 + number)], group=each.group)
        for_this = plans.list_plans(db, PlanQuery(on_front=True))
        assert len(for_this) == number + 1


def test_imported_plans_are_marked_and_imported_once(db):
    stage = scene(db)
    (first,) = plans.import_plans(db, figures=[figures("RRSS", 0.8, 2.0)], group=stage.group)
    (again,) = plans.import_plans(db, figures=[figures("RRSS", 0.9, 2.0)], group=stage.group)
    (measured,) = plans.publish(db, stage.job, figures=[figures("RRSS", 0.85, 1.9)], group=stage.group)
    assert (again.id, again.origin, again.job_id, again.accuracy) == (first.id, "imported", None, 0.9)
    assert measured.origin == "measured"
    assert len(plans.list_plans(db)) == 2
    assert_flags_are_right(db)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accuracy": math.nan}, "accuracy is nan"),
        ({"speedup_high": math.inf}, "speedup_high is inf"),
        ({"accuracy": 1.2, "accuracy_high": 1.3}, r"accuracy is 1\.2, outside \[0, 1\]"),
        ({"dense_accuracy": -0.1}, "dense_accuracy is -0.1"),
        ({"confidence": 95.0}, r"confidence is 95\.0, outside \(0, 1\)"),
        ({"speedup": -2.0, "speedup_low": -3.0, "latency_seconds": 1.0}, "speedup is -2.0, must be above 0"),
        ({"latency_seconds": -1.0}, "latency_seconds is -1.0, must be above 0"),
        ({"n_samples": 0}, "n_samples is 0, must be at least 1"),
        ({"difference_low": 0.5, "difference_high": 0.1}, "difference_low is above difference_high"),
        ({"accuracy_low": 0.99}, "accuracy_low is above accuracy_high"),
    ],
)
def test_impossible_figures_publish_nothing(db, change, message):
    stage = scene(db)
    with pytest.raises(InvalidValue, match=f"plan RSSS: {message}"):
        plans.publish(db, stage.job, figures=[figures("RRSS"), figures("RSSS", **change)], group=stage.group)
    assert plans.list_plans(db) == []


def test_two_jobs_publish_into_one_group_at_once(db):
    stages_of = [replace(scene(db, f"d{n}")) for n in range(6)]

    def publish(number):
        mine = [
            figures(plan, 0.5 + (number + k) % 7 / 20, 1 + (number * 3 + k) % 5 / 4) for k, plan in enumerate(names)
        ]
        plans.publish(db, stages_of[number].job, figures=mine, group=stages_of[number].group)

    names = ["RRSS", "RSRS", "RSSR", "SRRS"]
    with ThreadPoolExecutor(6) as threads:
        list(threads.map(publish, range(6)))
    assert len(plans.list_plans(db, PlanQuery(limit=None))) == 24
    assert_flags_are_right(db)


@pytest.fixture
def many(db):
    """Plans of two models, two tasks (one in two versions), two devices and two workloads."""
    generator = iter(range(10**6))
    stage = scene(db)
    models = [stage.model_id, model(db, "models/other", "9999aaaa")]
    tasks = [stage.task_id, task(db, "easy-vqa", "d2"), task(db, "captions")]
    devices = [stage.device_id, lookup.ensure_device(db, "NVIDIA H100")]
    with db.transaction() as session:
        for model_id, task_id, device_id, workload in itertools.product(models, tasks, devices, ["w1", "w2"]):
            batch = []
            for _ in range(4):
                n = next(generator)
                accuracy = 0.5 + (n * 7 % 23) / 50
                speedup = 1 + (n * 11 % 29) / 20
                slack = (n * 5 % 7) / 100
                batch.append(
                    figures(
                        format(n, "b").replace("0", "R").replace("1", "S"),
                        accuracy,
                        speedup,
                        difference_low=accuracy - 0.95 - slack,
                        latency_seconds=(1 + n % 5 / 10) / speedup,
                    )
                )
            group = Scene(stage.job, model_id, task_id, device_id, workload).group
            plans.publish(session, stage.job, figures=batch, group=group)
    return db


FILTERS = [
    dict(zip(("device", "workload"), where, strict=True))
    for where in itertools.product([None, "NVIDIA H100", "test"], [None, "w1"])
]
CONSTRAINTS = [
    {},
    {"max_accuracy_drop": 0.1},
    {"max_accuracy_drop": 0.25, "min_speedup": 1.4},
    {"min_accuracy": 0.8},
    {"min_accuracy": 0.7, "max_latency_seconds": 0.6},
    {"max_latency_seconds": 0.55, "max_accuracy_drop": 0.4},
    {"min_speedup": 99.0},
]
ORDERS = {
    "speedup": (["speedup", "accuracy", "difference_low", "latency_seconds", "id"], [False, False, False, True, True]),
    "accuracy": (["accuracy", "difference_low", "speedup", "latency_seconds", "id"], [False, False, False, True, True]),
    "latency_seconds": (
        ["latency_seconds", "speedup", "accuracy", "difference_low", "id"],
        [True, False, False, False, True],
    ),
    "difference": (
        ["difference_low", "speedup", "accuracy", "latency_seconds", "id"],
        [False, False, False, True, True],
    ),
    "newest": (["id"], [False]),
}


def reference(frame, model, task, device, workload, constraints, sort):
    """The answer by pandas, from a frame of all plans."""
    if model is not None:
        frame = frame[frame["model"] == model]
    if task is not None:
        frame = frame[frame["task"] == task]
    if device is not None:
        frame = frame[frame["device"].str.contains(device)]
    if workload is not None:
        frame = frame[frame["workload"] == workload]
    if "max_accuracy_drop" in constraints:
        frame = frame[frame["difference_low"] >= -constraints["max_accuracy_drop"]]
    if "min_accuracy" in constraints:
        frame = frame[frame["accuracy"] >= constraints["min_accuracy"]]
    if "min_speedup" in constraints:
        frame = frame[frame["speedup"] >= constraints["min_speedup"]]
    if "max_latency_seconds" in constraints:
        frame = frame[frame["latency_seconds"] <= constraints["max_latency_seconds"]]
    columns, ascending = ORDERS[sort]
    return frame.sort_values(columns, ascending=ascending)["id"].tolist()


def test_best_agrees_with_pandas(many):
    frame = overview.frame(plans.list_plans(many, PlanQuery(limit=None)), Plan)
    assert len(frame) == 96
    empty = found = 0
    sorts = itertools.cycle(["speedup", "accuracy", "latency_seconds", "speedup", "latency_seconds"])
    for (name, task_name), where, constraints in itertools.product(
        [("models/tiny", "easy-vqa"), ("models/other", "captions")], FILTERS, CONSTRAINTS
    ):
        sort = next(sorts)
        wanted = reference(frame, name, task_name, **where, constraints=constraints, sort=sort)
        got = plans.best(many, PlanQuery(name, task_name, **where, **constraints, sort=sort))
        assert (got.id if got else None) == (wanted[0] if wanted else None)
        empty, found = empty + (got is None), found + (got is not None)
    assert min(empty, found) > 10, "both outcomes were tried"


def test_list_agrees_with_pandas(many):
    frame = overview.frame(plans.list_plans(many, PlanQuery(limit=None)), Plan)
    filters, constraints, limits = map(itertools.cycle, (FILTERS, CONSTRAINTS, [5, None, 1]))
    for name, task_name, sort in itertools.product(["models/tiny", None], ["easy-vqa", "captions", None], ORDERS):
        for _ in range(2):
            where, constraint, limit = next(filters), next(constraints), next(limits)
            wanted = reference(frame, name, task_name, **where, constraints=constraint, sort=sort)[:limit]
            got = plans.list_plans(many, PlanQuery(name, task_name, **where, **constraint, sort=sort, limit=limit))
            assert [each.id for each in got] == wanted


def test_front_of_a_list_is_the_pareto_front(many):
    found = plans.list_plans(many, PlanQuery("tiny", "captions", device="NVIDIA H100", workload="w1", on_front=True))
    everything = plans.list_plans(many, PlanQuery("tiny", "captions", device="NVIDIA H100", workload="w1"))
    assert {each.id for each in found} == {p.id for p in everything if not any(dominates(q, p) for q in everything)}
    assert 0 < len(found) < len(everything)


def test_drop_is_judged_on_its_upper_bound(db):
    stage = scene(db)
    sure = figures("RRSS", 0.94, 1.2, difference_low=-0.015)
    unsure = figures("RSSS", 0.94, 1.8, difference_low=-0.03)
    plans.publish(db, stage.job, figures=[sure, unsure], group=stage.group)
    assert plans.best(db, PlanQuery("tiny", "easy-vqa", max_accuracy_drop=0.03)).plan == "RSSS"
    assert plans.best(db, PlanQuery("tiny", "easy-vqa", max_accuracy_drop=0.02)).plan == "RRSS"
    assert plans.best(db, PlanQuery("tiny", "easy-vqa", max_accuracy_drop=0.01)) is None


def test_best_of_what_is_not_known(db):
    scene(db)
    with pytest.raises(NotFound, match=r"no model 'tinny' in the database; did you mean tiny"):
        plans.best(db, PlanQuery("tinny", "easy-vqa"))
    with pytest.raises(NotFound, match="no task 'vqa'"):
        plans.best(db, PlanQuery("tiny", "vqa"))
    with pytest.raises(NotFound, match="no device 'TPU'"):
        plans.best(db, PlanQuery("tiny", "easy-vqa", device="TPU"))
    assert plans.best(db, PlanQuery("tiny", "easy-vqa")) is None
    with pytest.raises(InvalidValue, match="name both"):
        plans.best(db, PlanQuery("tiny"))
    with pytest.raises(InvalidValue, match="'speed'; choose speedup, accuracy or latency_seconds"):
        plans.best(db, PlanQuery("tiny", "easy-vqa", sort="speed"))
    with pytest.raises(InvalidValue, match="cannot be sorted by 'speed'; choose one of speedup"):
        plans.list_plans(db, PlanQuery(sort="speed"))


def test_lists_of_an_empty_database(db):
    assert plans.list_plans(db) == []
    task(db, "easy-vqa")
    assert plans.list_plans(db, PlanQuery(task="easy-vqa")) == []


def test_figures_of_an_old_model_are_not_offered_for_a_new_one_of_the_same_name(db):
    stage = scene(db)
    plans.publish(db, stage.job, figures=[figures("RRSS")], group=stage.group)
    model(db, "models/tiny", "retrained")
    assert plans.best(db, PlanQuery("models/tiny", "easy-vqa")) is None
    assert plans.best(db, PlanQuery("f1e2d3c4", "easy-vqa")).plan == "RRSS"


def test_frame_of_plans(many):
    listed = plans.list_plans(many, PlanQuery("tiny", "captions", sort="accuracy", limit=3))
    frame = overview.frame(listed, Plan)
    assert frame["id"].tolist() == [each.id for each in listed]
    assert frame["accuracy"].tolist() == [each.accuracy for each in listed]
    assert {"plan", "speedup_low", "difference_low", "device", "on_front"} <= set(frame.columns)
    assert isinstance(frame["published_at"].dtype, pd.DatetimeTZDtype)


def test_plans_of_a_job(many):
    (job,) = jobs.list_jobs(many)
    found = plans.for_job(many, job.id)
    assert len(found) == 96
    assert [each.speedup for each in found] == sorted((each.speedup for each in found), reverse=True)


def test_lossless_plans_stand_apart(db):
    """Their front is of speed-up and memory, and nobody gets one without asking."""
    one = scene(db)
    alone = plans.publish(db, one.job, one.group, [figures("RSRR", speedup=1.2, accuracy=0.8, difference=-0.1)])
    other = claimed(db, "driver-2")
    same = {"accuracy": 0.9, "difference": 0.0, "difference_low": 0.0, "difference_high": 0.0}
    drafters = plans.publish(
        db,
        other,
        replace(one.group, mode="lossless"),
        [
            figures("RSSR", speedup=1.5, extra_bytes=300, **same),
            figures("RSRR", speedup=1.3, extra_bytes=200, **same),
            figures("RRSR", speedup=1.2, extra_bytes=250, **same),
        ],
    )
    assert [each.on_front for each in drafters] == [True, True, False]
    assert {each.mode for each in drafters} == {"lossless"} and alone[0].mode == "standalone"
    assert alone[0].on_front
    asked = PlanQuery("tiny", "easy-vqa")
    assert plans.best(db, asked).id == alone[0].id
    assert plans.best(db, replace(asked, mode="lossless")).id == drafters[0].id
    assert [each.id for each in plans.list_plans(db, asked)] == [alone[0].id]
    assert [each.id for each in plans.list_plans(db, replace(asked, mode="lossless", on_front=True))] == [
        each.id for each in drafters[:2]
    ]
    imported = [replace(one.group, mode=mode) for mode in ("standalone", "lossless")]
    for group in imported:  # the same plan in both modes
        plans.import_plans(db, group, [figures("RSRR", extra_bytes=1)])
    assert len(plans.list_plans(db, asked)) == 2 and len(plans.list_plans(db, replace(asked, mode="lossless"))) == 4
