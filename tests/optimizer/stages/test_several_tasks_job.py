"""A job of several tasks with limits beside them, from the dense check to what is published, on the bundled model."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import in_process
import pytest
import torch

from optimizer.errors import NoFeasiblePlan, UsageFault
from optimizer.job.best import _accurate, find_best
from optimizer.job.inputs import prepare
from optimizer.job.loading import load_job
from optimizer.job.present import PresentVersions
from optimizer.job.result import load_result, losses
from optimizer.preflight.checks import check_job_file
from optimizer.reports.html import write_report
from optimizer.search.space import Candidate
from optimizer.stages import pipeline
from optimizer.stages.cached_evaluation import CachedEvaluation
from optimizer.stages.context import JobContext
from optimizer.stages.publish import Published
from storage.database import Database
from storage.queue import leases
from storage.records import evaluations, plans
from storage.records.plans import PlanQuery
from workers.evaluation.plain import PlainEvaluator
from workers.messages import EvaluatePlans
from workers.runtime import SkipPlan, apply
from workers.tasks import load_task
from workers.tasks.passages import TextTask

SIZES = {"calibration": 8, "search": 8, "held_out": 12, "unit": "samples"}
CAREFUL, FAST = "RRRRRRRRRRRS", "SSSSSSSSSSRR"
REWORDED = """
name: reworded
source: {kind: easy-vqa}
prompt: "look: {question}"
answer: {kind: short, max_new_tokens: 4}
metric: exact_match
splits: {unit: samples, calibration: 8, search: 8, held_out: 12}
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = ["red", "blue", "green", "circle", "square", "triangle", "left of", "above", "a", "is there", "no", "yes"]
    path.write_text(" ".join(random.Random(0).choices(words, k=1900)))
    return path


def wanted(text: Path, tmp_path: Path, **fields: Any) -> Any:
    other = tmp_path / "reworded.yaml"
    other.write_text(REWORDED)
    search = {"plans": [CAREFUL, FAST], "trials": 2, "latency_model": "layers", "finalists": 2, "rungs": [10]}
    base: dict[str, Any] = {
        "task": None,
        "tasks": ["easy-vqa", {"task": str(other), "max_accuracy_drop": 1.0, "weight": 2}],
        "constraint": {"max_accuracy_drop": 1.0},
        "collateral": {"text": str(text), "max_kl": 30, "samples": 8},
        "actions": ["skip"],
        "splits": SIZES,
        "redundancy_samples": 2,
        "search": search,
        "latency": {"max_seconds": 1},
        "workload": {"new_tokens": 2},
        "guard": {"false_alarms": None},
        "artifacts": str(tmp_path / "maps"),
    }
    return in_process.spec(**base | fields)


@pytest.fixture(scope="module")
def model() -> in_process.OneWorker:
    return in_process.OneWorker("llava-12", prepare(in_process.spec()).task)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    with Database.open(f"sqlite:///{tmp_path_factory.mktemp('db') / 'skipplan.db'}", create=True) as db:
        yield db


Begin = Callable[..., JobContext]


@pytest.fixture(scope="module")
def begin(
    store: Database, model: in_process.OneWorker, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Begin]:
    directory = tmp_path_factory.mktemp("job")

    def begin(**fields: Any) -> JobContext:
        context = in_process.context(store, model, wanted(text, directory, **fields))
        model.handler, model.requests = model.handler.with_task(context.task), []
        return context

    with pytest.MonkeyPatch.context() as patch:
        in_process.lock_apart(patch, directory)
        yield begin


@pytest.fixture(scope="module")
def finished(begin: Begin, store: Database) -> tuple[JobContext, Published]:
    """A job on two tasks with a limit on text, from the dense check to its published plans."""
    context = begin()
    published = pipeline.run(context)
    leases.finish(store, context.job)
    return context, published


def test_a_plan_is_judged_on_every_task_and_on_text(
    finished: tuple[JobContext, Published], store: Database, model: in_process.OneWorker
) -> None:
    context, published = finished
    assert published.best is not None, published.reason
    for plan in plans.for_job(store, context.job.id):
        found = {each.name: each for each in losses(plan)}
        assert list(found) == ["easy-vqa", "reworded", "text"]
        for name in ("easy-vqa", "reworded"):
            part = next(each for each in context.task.parts if each.name == name)
            evaluator = PlainEvaluator(model.handler.loaded, part)
            own = evaluator.evaluate(SkipPlan.parse(plan.plan), "held_out")
            dense = evaluator.evaluate(SkipPlan.dense(12), "held_out")
            assert found[name].accuracy == pytest.approx(own.accuracy)
            assert found[name].loss == pytest.approx(dense.accuracy - own.accuracy)
        (beside,) = context.task.beside
        assert isinstance(beside, TextTask)
        assert found["text"].loss == pytest.approx(_divergence(model, plan.plan, beside), rel=0.02, abs=1e-4)
        assert found["text"].n_samples == len(beside.held_out)
        worst = max((found["easy-vqa"], found["reworded"]), key=lambda each: each.loss_high)
        assert (plan.accuracy, plan.difference_low) == (worst.accuracy, -worst.loss_high)
        assert plan.task == "easy-vqa+reworded"
    searched = evaluations.for_job(store, context.job.id, "search")
    assert len({each.task_id for each in searched}) == 3
    page = write_report(store, context.job.id)
    assert "Losses held-out" in page and "nats a token" in page
    result = load_result(store, context.job.id)
    assert result.best is not None and result.search["plans_tried"] >= 2


def _divergence(model: in_process.OneWorker, plan: str, beside: TextTask) -> float:
    """Mean KL(dense || plan) a token over whole passages, by two forward passes over the whole vocabulary."""
    loaded, values = model.handler.loaded, []
    for passage in beside.held_out:
        tokens = torch.tensor([loaded.processor.tokenizer(passage.text)["input_ids"][:512]])

        def log_probabilities(tokens: torch.Tensor = tokens) -> torch.Tensor:
            return loaded.model(input_ids=tokens).logits[0, :-1].float().log_softmax(-1)

        with torch.inference_mode():
            dense = log_probabilities()
            with apply(loaded.model, SkipPlan.parse(plan)):
                own = log_probabilities()
        values.append(float((dense.exp() * (dense - own)).sum(-1).mean()))
    return sum(values) / len(values)


def test_what_a_job_stored_is_not_asked_again(
    finished: tuple[JobContext, Published], begin: Begin, store: Database, model: in_process.OneWorker
) -> None:
    context, published = finished
    model.requests.clear()
    assert pipeline.run(replace(context)) == published
    assert not [each for each in model.requests if isinstance(each, EvaluatePlans)]
    search = {"plans": [FAST], "trials": 1, "latency_model": "layers"}
    alone = begin(task="easy-vqa", tasks=(), collateral={}, search=search)
    pipeline.run(alone)
    leases.finish(store, alone.job)
    asked = [each for each in model.requests if isinstance(each, EvaluatePlans) and FAST in each.plans]
    assert not asked, "both splits of the task were scored by the job of several"


def test_scores_under_fitted_maps_are_of_the_tasks_that_these_were_fitted_to(
    begin: Begin, store: Database, model: in_process.OneWorker
) -> None:
    """Without maps a plan scores the same in any job; with maps it does not, though the recipe reads the same."""
    plain, fitted = Candidate(SkipPlan.parse(CAREFUL)), Candidate(SkipPlan.parse(CAREFUL), "linear tokens=200")
    asked = [(plain, 3), (fitted, 3)]
    context = begin(collateral={})
    part = next(each for each in context.task.parts if each.name == "easy-vqa")
    list(CachedEvaluation(context, "search", task=part)(asked))
    leases.finish(store, context.job)
    alone = begin(task="easy-vqa", tasks=(), collateral={}, search={})
    list(CachedEvaluation(alone, "search")(asked))
    leases.finish(store, alone.job)
    sent = [each for each in model.requests if isinstance(each, EvaluatePlans)]
    assert [each.compensation for each in sent] == [fitted.compensation]


def test_an_impossible_task_is_named_with_what_could_be_had(begin: Begin, store: Database) -> None:
    context = begin(
        tasks=[{"task": "easy-vqa", "max_accuracy_drop": None}, {"task": "scenes", "max_accuracy_drop": 0.0001}],
        collateral={},
        search={"plans": [FAST], "strategy": "random", "seeds": "none", "trials": 1, "latency_model": "layers"},
    )
    published = pipeline.run(context)
    leases.finish(store, context.job)
    assert published.best is None
    assert "on scenes none is within its limit" in published.reason
    assert f"without scenes, {FAST} is predicted to run" in published.reason


def test_best_is_asked_for_several_tasks_and_bounds(finished: tuple[JobContext, Published], store: Database) -> None:
    best = finished[1].best
    query = PlanQuery("llava-12", "reworded+easy-vqa")
    found, changed = find_best(store, query)
    assert (found.id, changed) == (best, ())
    text = next(each for each in losses(found) if each.is_text)
    assert find_best(store, query, max_text_kl=text.loss_high * 1.001)[0].id == best
    with pytest.raises(NoFeasiblePlan):
        find_best(store, query, max_text_kl=min(text.loss_high, 1e-9))
    lowest = min(each.accuracy for each in losses(found) if each.weight)
    assert find_best(store, replace(query, min_accuracy=lowest, max_accuracy_drop=1.0))[0].id == best
    assert PresentVersions(store).changes(found) == ()


def test_a_plan_is_as_accurate_as_on_its_least_accurate_task(
    finished: tuple[JobContext, Published], store: Database
) -> None:
    plan = plans.get(store, finished[1].best or 0)
    goals = [dict(each) for each in plan.secondary["goals"]]
    goals[0] |= {"accuracy": 0.9, "loss_high": 0.5}  # the worst loss, on the task that is answered best
    goals[1] |= {"accuracy": 0.6, "loss_high": 0.1}
    changed = replace(plan, accuracy=0.9, secondary={"goals": goals})
    asked = PlanQuery("llava-12", "easy-vqa+reworded", min_accuracy=0.6)
    assert _accurate(changed, asked)
    assert not _accurate(changed, replace(asked, min_accuracy=0.61))
    for odd in ("x", 5, [1], [{"name": "a"}], {"a": 1}):  # an imported plan may hold anything
        assert losses(replace(plan, secondary={"goals": odd})) == ()


def test_tasks_beside_the_jobs_own_share_no_image_with_them(begin: Begin, tmp_path: Path) -> None:
    other = tmp_path / "again.yaml"
    other.write_text(REWORDED.replace("name: reworded", "name: again").replace("search: 8", "search: 20"))
    collateral = {"tasks": [str(other)], "max_accuracy_drop": 0.5}
    with pytest.raises(UsageFault, match=r"collateral.tasks: tasks .* share \d+ images between the search split"):
        begin(collateral=collateral)


def test_limits_on_text_are_not_proven_on_the_text_of_the_fit(begin: Begin, text: Path, tmp_path: Path) -> None:
    fitted = tmp_path / "fitted.txt"
    fitted.write_text("something else first " * 40 + text.read_text())
    with pytest.raises(UsageFault, match=r"passages of collateral\.text stand in compensation\.text"):
        begin(compensation={"kind": "linear", "text": str(fitted), "tokens": 100})


def test_a_changed_part_is_noticed(begin: Begin, store: Database, tmp_path: Path) -> None:
    data = tmp_path / "own.csv"
    rows = load_task("easy-vqa").search[:60]
    with data.open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "question", "answers"])
        writer.writerows([[row.image.path, row.question, row.answers[0]] for row in rows])
    task = tmp_path / "own.yaml"
    task.write_text(
        "name: own\nsource: {kind: file, path: own.csv}\nprompt: '{question}'\nmetric: exact_match\n"
        "answer: {kind: short, max_new_tokens: 4}\n"
        "splits: {unit: samples, calibration: 4, search: 4, held_out: 4}\n"
    )
    context = begin(
        tasks=[str(task), "rendered-text"],
        collateral={},
        splits={"calibration": 4, "search": 4, "held_out": 4},
        constraint={"max_accuracy_drop": 1.0, "min_dense_accuracy": 0},
        search={"plans": [FAST], "trials": 1, "latency_model": "layers"},
    )
    pipeline.run(context)
    leases.finish(store, context.job)
    plan = plans.for_job(store, context.job.id)[0]
    assert plan.task == "own+rendered-text"
    assert PresentVersions(store).changes(plan) == ()
    assert plan.task_id in (PresentVersions(store).only(PlanQuery()).task_ids or ())
    task.write_text(task.read_text().replace("'{question}'", "'{question} answer in a word'"))
    assert plan.task_id not in (PresentVersions(store).only(PlanQuery()).task_ids or ())
    assert PresentVersions(store).changes(plan) == ("prompt, answer or metric",)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ("tasks: [easy-vqa]", "tasks: holds one task"),
        ("task: easy-vqa\ntasks: [easy-vqa, scenes]", "task: name one task here, or two or more under tasks"),
        ("tasks: [easy-vqa, easy-vqa]", "task easy-vqa is given 2 times"),
        ("tasks: [easy-vqa, {task: scenes, max_drop: 1}]", "tasks.1.max_drop"),
        ("task: easy-vqa\ncollateral: {max_kl: 0.3}", "collateral: max_kl: needs a text"),
        ("task: easy-vqa\ncollateral: {tasks: [easy-vqa], max_accuracy_drop: 0.1}", "easy-vqa is a task of the job"),
        ("task: easy-vqa\ncollateral: {text: short.txt, max_kl: 0.3}", "collateral.text: the text has"),
        ("task: scenes\nmode: lossless\nworkload: {new_tokens: 12}\ntasks: [scenes, easy-vqa]", "task: name one"),
        ("mode: lossless\nworkload: {new_tokens: 12}\ntasks: [scenes, easy-vqa]", "drafts for one task"),
    ],
)
def test_bad_fields_are_named_in_one_line(tmp_path: Path, fields: str, said: str) -> None:
    (tmp_path / "short.txt").write_text("too short to be cut")
    file = tmp_path / "job.yaml"
    file.write_text(f"model: {{path: llava-12}}\n{fields}\n")
    with pytest.raises(UsageFault) as raised:
        prepare(load_job(file, environment={}))
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_limits_are_written_out_and_read_back(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(
        "model: {path: llava-12}\ntasks: [easy-vqa, {task: scenes, max_accuracy_drop: null}]\n"
        "constraint: {max_accuracy_drop: 0.02, min_accuracy: 0.5}\n"
    )
    spec = load_job(file, environment={})
    assert [(goal.max_accuracy_drop, goal.min_accuracy) for goal in spec.tasks] == [(0.02, 0.5), (None, 0.5)]
    assert type(spec).model_validate(spec.model_dump(mode="json")) == spec
    assert "task" not in spec.canonical() and "tasks" in spec.canonical()


def test_validate_says_which_task_has_too_few_samples(tmp_path: Path, text: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(
        "model: {path: llava-12}\ntasks: [easy-vqa, {task: scenes, max_accuracy_drop: 0.5}]\n"
        f"collateral: {{text: {text}, max_kl: 0.3}}\nsplits: {{calibration: 8, search: 8, held_out: 20}}\n"
    )
    found = check_job_file(file, quick=True)
    assert found.task == "easy-vqa+scenes"
    (note,) = [each for each in found.notes if "cannot be proven" in each]
    assert note.startswith("max_accuracy_drop of easy-vqa: 0.01 cannot be proven")
