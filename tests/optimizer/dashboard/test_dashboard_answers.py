"""Pages and API: what they show is what the database holds, and what cannot be shown is said."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text

from optimizer.dashboard.app import create_app
from storage.database import Database

PAGES = ("/", "/docs", "/jobs/1", "/jobs/2", "/jobs/3", "/plans", "/models", "/jobs/1/report", "/jobs/6/report")
TOKEN = "a token of enough letters"


@pytest.fixture(scope="module")
def client(filled: Database) -> Iterator[TestClient]:
    with TestClient(create_app(filled)) as client:
        yield client


def stored(db: Database, statement: str) -> list[dict[str, object]]:
    with db.reading() as session:
        return [dict(row._mapping) for row in session.execute(text(statement))]


def test_jobs_with_their_states_and_progress(client: TestClient) -> None:
    listed = client.get("/api/jobs").json()
    states = {job["id"]: job["state"] for job in listed}
    assert states == {
        6: "queued", 5: "infeasible", 4: "cancelled", 3: "failed", 2: "running", 1: "succeeded"
    }  # fmt: skip
    assert [job["id"] for job in listed] == [6, 5, 4, 3, 2, 1]
    assert listed[4]["progress"] == {"stage": "search", "done": 37, "total": 200, "news": "RSRR"}
    assert [job["id"] for job in client.get("/api/jobs?state=failed&state=queued").json()] == [6, 3]
    assert [job["id"] for job in client.get("/api/jobs?before=3&limit=1").json()] == [2]
    page = client.get("/").text
    assert "search 37/200" in page
    assert '<progress max="200" value="37"' in page


def test_plans_are_the_database_s(client: TestClient, filled: Database) -> None:
    listed = {plan["id"]: plan for plan in client.get("/api/plans").json()}
    rows = stored(filled, "SELECT * FROM plans")
    assert len(listed) == len(rows) == 3
    for row in rows:
        plan = listed[row["id"]]
        same = plan.keys() & row.keys() - {"published_at", "on_front", "secondary"}
        assert {name: plan[name] for name in same} == {name: row[name] for name in same}
        assert plan["secondary"] == json.loads(row["secondary"])
        assert client.get(f"/api/plans/{row['id']}").json() == plan
    assert client.get("/api/jobs/1").json()["plans"] == client.get("/api/plans").json()


@pytest.mark.parametrize(
    ("query", "speedups"),
    [
        ("max_accuracy_drop=0.02", [1.523, 1.131]),
        ("min_speedup=1.5", [1.871, 1.523]),
        ("engine=vllm&min_speedup=1.05", [1.131]),
        ("engine=vllm&concurrency=16&min_speedup=1.05", []),
        ("sort=accuracy", [1.131, 1.523, 1.871]),
        ("model=tiny-llava&task=shapes&device=test&limit=1", [1.871]),
    ],
)
def test_plans_are_filtered_and_sorted(client: TestClient, query: str, speedups: list[float]) -> None:
    assert [plan["speedup"] for plan in client.get(f"/api/plans?{query}").json()] == speedups


def test_form_takes_points_and_keeps_what_was_chosen(client: TestClient) -> None:
    page = client.get("/plans?max_points=2&min_speedup=1,2&model=&sort=difference&front=true").text
    assert page.count('class="strip') == 1
    assert 'name="max_points" inputmode="decimal" value="2"' in page
    assert '<option value="difference" selected>' in page
    assert 'name="front" value="true" checked' in page


@pytest.mark.parametrize(
    ("path", "status", "told"),
    [
        ("/plans?max_points=two", 400, "largest loss: &#39;two&#39; is no number"),
        ("/plans?min_speedup=-1", 400, "smallest speed-up: must lie between 0 and 1000"),
        ("/plans?model=tiny-lava", 404, "did you mean"),
        ("/jobs/99", 404, "there is no job 99"),
        ("/jobs/99/report", 404, "there is no job 99"),
        ("/jobs/0", 422, "greater than or equal to 1"),
        ("/nowhere", 404, "Not Found"),
        ("/static/../app.py", 404, ""),
        ("/static/secrets", 404, "there is no file secrets"),
        ("/api/plans/99", 404, "there is no plan 99"),
        ("/api/plans?task=shape", 404, "did you mean shapes?"),
        ("/api/plans?sort=best", 422, "speedup"),
        ("/api/jobs?limit=0", 422, "limit"),
    ],
)
def test_what_cannot_be_shown(client: TestClient, path: str, status: int, told: str) -> None:
    answer = client.get(path)
    assert (answer.status_code, told in answer.text) == (status, True)
    kind = "application/json" if path.startswith("/api/") else "text/html"
    assert answer.headers["content-type"].startswith(kind)


def test_names_and_messages_cannot_become_markup(client: TestClient) -> None:
    for path in ("/", "/jobs/3", "/jobs/6", "/jobs/6/report", "/jobs/3/report"):
        page = client.get(path).text
        assert "<script>alert" not in page
        assert "</title>odd" not in page


@pytest.mark.parametrize("path", PAGES)
def test_pages_load_only_from_the_dashboard_itself(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 200
    for source in re.findall(r'(?:src|href|action)="([^"]*)"', answer.text):
        assert source.startswith(("/", "#", "data:,")), source
        if source.startswith("/static/"):
            assert client.get(source).status_code == 200
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert not re.search(r"<script(?![^>]*(src=|application/json))", answer.text)


def test_nothing_can_be_written(client: TestClient) -> None:
    for method in ("POST", "PUT", "PATCH", "DELETE"):
        for path in ("/api/jobs", "/api/jobs/1", "/api/plans/1", "/", "/jobs/1"):
            assert client.request(method, path).status_code == 405


def test_report_is_kept_until_something_changes(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    from optimizer.dashboard import html

    first = client.get("/jobs/1/report").text
    monkeypatch.setattr(html, "collect", lambda *_: pytest.fail("the report was written again"))
    assert client.get("/jobs/1/report").text == first


def test_openapi_document_is_linked_and_described(client: TestClient) -> None:
    assert '<a href="/docs">API</a>' in client.get("/").text
    document = client.get("/openapi.json").json()
    assert all(path.startswith("/api/") for path in document["paths"])
    for methods in document["paths"].values():
        for parameter in methods["get"].get("parameters", ()):
            assert parameter["schema"].get("title") and (parameter.get("description") or parameter["in"] == "query")


def test_foreign_host_names_are_refused(client: TestClient) -> None:
    assert client.get("/", headers={"Host": "rebound.example"}).status_code == 400


class TestWithToken:
    @pytest.fixture
    def locked(self, filled: Database) -> Iterator[TestClient]:
        with TestClient(create_app(filled, host="0.0.0.0", token=TOKEN), follow_redirects=False) as client:
            yield client

    def test_nothing_is_shown_without_it(self, locked: TestClient) -> None:
        for path in PAGES:
            answer = locked.get(path)
            assert (answer.status_code, answer.headers["location"]) == (303, "/login")
        for path in ("/api/jobs", "/api/plans/1", "/openapi.json", "/api/nowhere"):
            assert locked.get(path).status_code == 401
            assert locked.get(path, headers={"Authorization": f"Bearer {TOKEN}x"}).status_code == 401
            assert locked.get(path, headers={"Authorization": f"Basic {TOKEN}"}).status_code == 401
        assert locked.get("/static/dashboard.css").status_code == 200

    def test_api_takes_it_as_bearer_token(self, locked: TestClient) -> None:
        assert locked.get("/api/jobs", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200

    def test_browser_logs_in_once(self, locked: TestClient) -> None:
        assert locked.post("/login", data={"token": "wrong"}).status_code == 401
        assert locked.get("/").status_code == 303
        answer = locked.post("/login", data={"token": f" {TOKEN} "})
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
        assert TOKEN not in cookie
        assert locked.get("/").status_code == 200
        assert json.loads(locked.get("/api/jobs").text)
