"""Every figure of a report is the database's: read back here with plain SQL, and compared with the written page."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter
from report_builders import LAYERS, claimed, finished_job, identities, queued, record_profile
from scipy.stats import spearmanr
from sqlalchemy import text

from optimizer.criteria.evidence import STAGE, Evidence
from optimizer.reports import figures, progress, theory
from optimizer.reports.data import collect
from optimizer.reports.html import write_report
from optimizer.search.pareto import hypervolume
from optimizer.statistics.rank_agreement import Agreement
from storage.database import Database
from storage.errors import NotFound
from storage.queue import jobs, leases
from storage.records.measurements import Redundancy
from storage.schema import JobStageRow


class Page(HTMLParser):
    """The words of a page, its tables by summary, its strips, and its charts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.words: list[str] = []
        self.strips: list[str] = []
        self.sources: list[str] = []
        self._within: list[str] = []
        self._summary = ""
        self.feed(page)
        found = re.search(r'<script type="application/json" id="charts">(.*?)</script>', page, re.S)
        assert found is not None
        self.charts = {chart["name"]: chart for chart in json.loads(found[1])}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.sources += [value for key, value in given.items() if key in ("src", "href") and value]
        if tag not in ("meta", "link", "br"):
            self._within.append(tag)
        if tag == "summary":
            self._summary = ""
        if tag == "tr":
            self.tables.setdefault(self._summary, []).append([])
        if tag in ("td", "th"):
            self.tables[self._summary][-1].append("")
        if tag == "div" and (given.get("class") or "").split()[:1] == ["strip"]:
            self.strips.append("")

    def handle_endtag(self, tag: str) -> None:
        while self._within and self._within.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        inside = self._within[-1] if self._within else ""
        if inside == "summary":
            self._summary += data.strip()
        elif inside in ("td", "th"):
            self.tables[self._summary][-1][-1] += data.strip()
        elif inside == "i" and self.strips and data.strip() in "RFBS":
            self.strips[-1] += data.strip()
        if inside not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def table(self, title: str) -> list[list[str]]:
        return next(rows for name, rows in self.tables.items() if name.startswith(title))

    def trace(self, chart: str, name: str) -> dict[str, Any]:
        return next(trace for trace in self.charts[chart]["traces"] if trace["name"] == name)


def rows(db: Database, statement: str) -> list[Any]:
    with db.reading() as session:
        return list(session.execute(text(statement)))


@pytest.fixture
def db(tmp_path: Path, sqlite_template: Path) -> Iterator[Database]:
    """SQLite alone: what reports read is tested on both engines with storage."""
    path = tmp_path / "report.db"
    shutil.copy(sqlite_template, path)
    with Database.open(f"sqlite:///{path}") as database:
        yield database


@pytest.fixture
def page(db: Database) -> Page:
    return Page(write_report(db, finished_job(db)))


def test_summary_tells_the_best_plans_figures(page: Page) -> None:
    for told in (
        "tiny-llava on shapes runs 1.52 times as fast as the dense model with 3 of 8 layers skipped (2-4)",
        "47.1 ms become 30.9 ms a request (batch 1, 4 new tokens) on test device, 1 thread",
        "the speed-up lies between 1.48 and 1.56 (95 % confidence, 71 alternating pairs with dense)",
        "on 321 held-out samples of 55 images it scores 0.944, the dense model 0.947: a difference of -0.30 points",
        "The loss is at most 1.53 points (upper end of the interval at 97.5 % confidence); the job allows 5 points",
        "The KV cache takes 62 % of the dense one's room",
        "13 plans tried, 9 of them on the whole search split of 40 samples; 1 could not be scored",
        "3 plans verified on held-out samples, 2 of them within the limits",
    ):
        assert told in page.text


def test_verified_plans_in_chart_and_table_are_the_database_s(db: Database, page: Page) -> None:
    stored = rows(
        db,
        "SELECT id, plan, speedup, speedup_low, speedup_high, difference, difference_low, difference_high, accuracy, "
        "accuracy_low, accuracy_high FROM plans ORDER BY speedup DESC",
    )
    drawn = {}
    for name in ("verified, within the limits", "verified, outside the limits"):
        trace = page.trace("front", name)
        for place, (plan, _) in enumerate(trace["customdata"]):
            x, y = trace["x"][place], trace["y"][place]
            drawn[plan] = (
                x, x - trace["error_x"]["arrayminus"][place], x + trace["error_x"]["array"][place],
                y, y - trace["error_y"]["arrayminus"][place], y + trace["error_y"]["array"][place],
            )  # fmt: skip
    assert len(stored) == len(drawn) == 3
    for row in stored:
        expected = (*row[2:5], *(100 * value for value in row[5:8]))
        assert drawn[row.plan] == pytest.approx(expected, abs=1e-9)
    for cells, row in zip(page.table("Verified plans")[1:], stored, strict=True):
        assert cells[0] == str(row.id)
        assert cells[2] == f"{row.accuracy:.3f} [{row.accuracy_low:.3f}, {row.accuracy_high:.3f}]"
        assert cells[3] == (
            f"{100 * row.difference:+.2f} [{100 * row.difference_low:+.2f}, {100 * row.difference_high:+.2f}]"
        )
        assert cells[4] == f"{row.speedup:.2f} [{row.speedup_low:.2f}, {row.speedup_high:.2f}]"
    assert page.strips[:3] == [row.plan for row in stored]
    assert [len(trace["x"]) for trace in (page.trace("front", "verified, outside the limits"),)] == [1]


def test_tried_plans_are_the_database_s(db: Database, page: Page) -> None:
    profile = rows(db, "SELECT dense_latency_seconds, layer_seconds FROM latency_profiles")[0]
    seconds = json.loads(profile.layer_seconds) if isinstance(profile.layer_seconds, str) else profile.layer_seconds
    drawn = {
        plan: (x, y, name)
        for name in ("tried, within the limits", "tried, outside the limits")
        for trace in (page.trace("front", name),)
        for x, y, (plan, _) in zip(trace["x"], trace["y"], trace["customdata"], strict=True)
    }
    stored = rows(
        db,
        "SELECT plan, n_samples, accuracy FROM evaluations "
        "WHERE split = 'search' AND failure IS NULL AND plan LIKE '%S%'",
    )
    assert len(drawn) == len(stored) == 12
    for plan, n, accuracy in stored:
        dense = (40 - 2) / 40 if n == 40 else (10 - 2) / 10  # the dense model misses the first two samples
        saved = sum(seconds["R"][layer] for layer, letter in enumerate(plan) if letter == "S")
        x, y, name = drawn[plan]
        assert x == pytest.approx(profile.dense_latency_seconds / (profile.dense_latency_seconds - saved))
        assert y == pytest.approx(100 * (accuracy - dense))
        within = n == 40 and accuracy - dense >= -0.05
        assert name == ("tried, within the limits" if within else "tried, outside the limits")


def test_heat_map_and_table_hold_every_measurement(db: Database, page: Page) -> None:
    stored = rows(db, "SELECT name, token_group, layer, value, standard_error, n FROM redundancy_measurements")
    table = {(cells[0], cells[1]): cells[2:] for cells in page.table("Measurements")[1:]}
    assert len(table) == len(stored) == 3 * LAYERS
    for row in stored:
        key = (f"{row.name.replace('_', ' ')}, {row.token_group}", str(row.layer))
        assert [float(table[key][0]), float(table[key][1])] == pytest.approx([row.value, row.standard_error], rel=1e-5)
        assert table[key][2] == f"{row.n:,}"
    heat = page.charts["redundancy"]["traces"][0]
    assert heat["y"] == ["cosine distance, text", "cosine distance, vision"]
    assert heat["z"][0] == pytest.approx([layer / (LAYERS - 1) for layer in range(LAYERS)])  # from lowest to highest
    assert "layer 2, cosine distance, vision: 0.03 ± 0.0007" in heat["customdata"][1][2][1]


def test_rows_of_the_heat_map_count_as_people_do() -> None:
    names = ["linear_redundancy@10", "linear_redundancy@2", "vision_attention", "linear_redundancy@1"]
    found = figures.heat_rows([Redundancy(0, "all", name, 0.5, None, 4) for name in names])
    numbers = [f"linear_redundancy@{run}" for run in (1, 2, 10)]
    assert [name for name, _ in found] == [*numbers, "vision_attention"]


def test_rank_correlation_is_scipy_s(db: Database) -> None:
    report = collect(db, finished_job(db))
    found = theory.check(report)
    assert found is not None
    risk = [0.01 * (layer + 1) + 0.05 for layer in range(LAYERS)]  # the larger of the vision and the text distance
    expected = {
        each.plan: sum(risk[layer] for layer, letter in enumerate(each.plan) if letter == "S")
        for each in report.trials
        if each.complete
    }
    assert {pair.label: pair.predicted for pair in found.plans.pairs} == pytest.approx(expected)
    losses = [-each.difference for each in report.trials if each.complete and each.difference is not None]
    agreement = found.plans.agreement
    assert agreement.rho == pytest.approx(spearmanr(list(expected.values()), losses).statistic)
    assert agreement.low is not None and agreement.high is not None
    assert agreement.low < agreement.rho < agreement.high


def test_what_the_report_says_of_the_criterion_is_what_the_search_recorded(db: Database) -> None:
    number = finished_job(db)
    assert "When the search began" not in write_report(db, number)  # nothing was recorded, so nothing is said
    evidence = Evidence("cosine", Agreement.of_pairs([0.1, 0.2, 0.3, 0.4, 0.5], [5.0, 4.0, 3.0, 2.0, 1.5]))
    payload = {"value": TypeAdapter(Evidence).dump_python(evidence, mode="json")}
    with db.transaction() as session:
        session.add(JobStageRow(job_id=number, stage=STAGE, attempt=1, payload=payload))
    assert collect(db, number).evidence == evidence and evidence.fails
    said = " ".join(write_report(db, number).split())
    assert "When the search began: criterion cosine does not predict harm" in said and "counts 0.00" in said


def test_progress_is_the_hypervolume_after_each_plan(db: Database) -> None:
    report = collect(db, finished_job(db))
    corner = progress.reference(report)
    steps = progress.steps(report.trials, corner)
    assert corner == (1.0, 0.05)
    for step in steps:
        points = [
            (1 / each.predicted_speedup, max(0.0, -each.difference))
            for each in report.trials
            if each.order <= step.plans and each.complete and each.difference is not None and each.predicted_speedup
        ]
        assert step.covered == pytest.approx(hypervolume(points, corner) / 0.05)
    assert [step.plans for step in steps] == sorted(step.plans for step in steps)
    assert steps[-1].plans == len(report.trials)


def test_latency_bars_add_up_to_the_profile(db: Database, page: Page) -> None:
    profile = rows(db, "SELECT dense_latency_seconds FROM latency_profiles")[0]
    running = page.trace("latency", "layers that run")
    outside = page.trace("latency", "outside the layers")
    assert running["y"][0] == "dense"
    assert running["x"][0] + outside["x"][0] == pytest.approx(1000 * profile.dense_latency_seconds)
    measured = dict(zip(page.trace("latency", "measured")["y"], page.trace("latency", "measured")["x"], strict=True))
    for plan_id, seconds in rows(db, "SELECT id, latency_seconds FROM plans"):
        assert measured[f"plan {plan_id}"] == pytest.approx(1000 * seconds)


def test_provenance_names_versions_hashes_and_seeds(page: Page) -> None:
    told = dict(cells for cells in page.table("Versions, hashes and seeds") if len(cells) == 2)
    assert told["specification (SHA-256)"] == "spec-hash-of-the-test"
    assert told["model fingerprint (SHA-256)"] == "f1e2d3c4b5a6"
    assert told["task data, prompt and metric (SHA-256)"] == "task-hash-of-the-test"
    assert told["search split (SHA-256)"] == "hash of search"
    assert told["seed of the splits"] == "3"
    assert told["search"] == "tpe, seed 7"
    assert told["settings of the evaluations"] == "dtype=float32 attention=sdpa device=cpu torch=2.13.0"
    assert told["samples evaluated"] == "4,321"
    assert told["of those, failed (image, processor, NaN, memory)"] == "3"
    assert told["of those, decided alone since rounding could decide"] == "17"
    assert told["layer executions"] == "not measured"
    assert "NaN in the logits" in page.text
    assert "max_accuracy_drop: 0.05" in page.text


def test_page_needs_nothing_from_elsewhere(db: Database) -> None:
    written = write_report(db, finished_job(db))
    assert [source for source in Page(written).sources if not source.startswith(("#", "data:"))] == []
    assert len(written.encode()) < 8_000_000


@pytest.mark.parametrize("stage", ["queued", "profiled", "failed", "cancelled"])
def test_unfinished_jobs_are_shown_as_far_as_they_came(db: Database, stage: str) -> None:
    if stage == "queued":
        job = queued(db)
    else:
        job = claimed(db)
        record_profile(db, job, identities(db))
        if stage == "failed":
            leases.fail(db, job, "the model <b>cannot</b> be loaded")
        if stage == "cancelled":
            jobs.cancel(db, job.id)
    told = write_report(db, job.id)
    page = Page(told)
    words = {
        "queued": "is waiting in the queue",
        "profiled": "is running",
        "failed": "failed",
        "cancelled": "was cancelled",
    }
    assert f"Job {job.id} (tiny-llava on shapes) {words[stage]}" in page.text
    assert "not measured" in page.text
    assert "<b>cannot</b>" not in told
    assert ("latency" in page.charts) == (stage != "queued")


def test_infeasible_job_says_that_dense_is_the_answer(db: Database) -> None:
    job = claimed(db)
    record_profile(db, job, identities(db))
    leases.infeasible(db, job, "no plan meets the constraint")
    assert "No plan met the constraint: the dense model is the answer for tiny-llava on shapes" in write_report(
        db, job.id
    )


def test_unknown_job(db: Database) -> None:
    with pytest.raises(NotFound, match="there is no job 99"):
        write_report(db, 99)


def test_the_addresses_of_hooks_stay_out_of_a_report(db: Database) -> None:
    hook = "https://chat.example/services/T0/secret"
    page = write_report(db, finished_job(db, notify=[hook, "command"]))
    assert "secret" not in page and "https://chat.example/..." in page
