"""Submit and steer jobs over HTTP: nothing gets in without the right token, nothing is lost, nothing is done twice."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest
from fastapi import HTTPException
from fastapi.testclient import TestClient

from optimizer.dashboard import policy
from optimizer.dashboard.app import create_app
from optimizer.dashboard.limits import LARGEST_BODY, RateLimit, Room
from optimizer.errors import UsageFault
from optimizer.job.loading import read_spec
from optimizer.job.spec import JobSpec
from storage.database import Database
from storage.queue import events, jobs, tokens
from storage.records import plans

JOB: dict[str, Any] = {"model": {"path": "llava-12"}, "task": "red.yaml", "search": {"trials": 4}}
FOREIGN = ("read", "submit", "other", "admin", "dashboard")


def submit(client: TestClient, job: dict[str, Any] = JOB, key: str | None = None, **more: Any) -> Any:
    return client.post("/api/jobs", json={"job": job, **more}, headers={} if key is None else {"Idempotency-Key": key})


def written(service: Any) -> list[tuple[int, str]]:
    return [(job.id, job.state) for job in jobs.list_jobs(service.db)]


def test_a_submitted_job_is_the_queue_s(service: Any) -> None:
    answer = submit(service.client("submit"))
    assert answer.status_code == 201, answer.text
    told = answer.json()
    job = jobs.get(service.db, told["job"]["id"])
    assert (told["new"], answer.headers["location"]) == (True, f"/api/jobs/{job.id}")
    assert (job.state, job.priority) == ("queued", 0)
    spec = read_spec(job)
    assert (spec.model.path, spec.task, spec.search.trials) == ("llava-12", str(service.files / "red.yaml"), 4)
    assert [event.message for event in events.for_job(service.db, job.id)][-1] == "by token submit"
    again = submit(service.client("other"))
    assert (again.status_code, again.json()["new"], again.json()["job"]["id"]) == (200, False, job.id)
    forced = submit(service.client("other"), force=True)
    assert forced.json()["job"]["id"] > job.id


def test_it_is_found_by_the_command_line_s_hash(service: Any, tmp_path: Path) -> None:
    from optimizer.job.inputs import prepare
    from optimizer.job.loading import load_job

    number = submit(service.client("submit")).json()["job"]["id"]
    (service.files / "job.yaml").write_text(json.dumps(JOB))
    inputs = prepare(load_job(service.files / "job.yaml", environment={}))
    assert jobs.get(service.db, number).spec_hash == inputs.spec_hash


class TestWhoMayDoWhat:
    OPERATIONS: ClassVar = (
        ("POST", "/api/jobs", {"job": JOB}, "submit"),
        ("POST", "/api/jobs/6/cancel", None, "admin"),
        ("POST", "/api/jobs/3/resume", None, "admin"),
        ("PUT", "/api/jobs/2/priority", {"priority": -1}, "admin"),
        ("POST", "/api/plans/1/exports", {"format": "nonsense"}, "submit"),
        ("GET", "/api/jobs", None, "read"),
        ("GET", "/api/jobs/1/evaluations", None, "read"),
        ("GET", "/openapi.json", None, "read"),
    )
    RANK: ClassVar = {"read": 0, "dashboard": 0, "submit": 1, "other": 1, "admin": 2}

    @pytest.mark.parametrize(("method", "path", "body", "role"), OPERATIONS)
    def test_by_token(self, service: Any, method: str, path: str, body: Any, role: str) -> None:
        before = written(service)
        nobody = service.client().request(method, path, json=body)
        assert nobody.status_code == 401 and nobody.headers["www-authenticate"] == "Bearer"
        for caller in FOREIGN:
            allowed = self.RANK[caller] >= self.RANK[role]
            if not allowed:
                assert service.client(caller).request(method, path, json=body).status_code == 403, caller
        assert written(service) == before
        answer = service.client("admin").request(method, path, json=body)
        assert answer.status_code in (200, 201, 400, 404), answer.text

    @pytest.mark.parametrize("given", ["", "x", "Bearer", "Basic {}", "Bearer {}x", "Bearer {} x", "Token {}"])
    def test_other_texts_are_no_token(self, service: Any, given: str) -> None:
        header = {"Authorization": given.format(service.tokens["admin"])}
        assert service.client().post("/api/jobs", json={"job": JOB}, headers=header).status_code == 401

    def test_a_token_in_the_url_is_none(self, service: Any) -> None:
        token = service.tokens["admin"]
        for query in (f"token={token}", f"access_token={token}", f"authorization=Bearer {token}"):
            assert service.client().get(f"/api/jobs?{query}").status_code == 401

    def test_a_removed_token_is_void_at_once(self, service: Any) -> None:
        client = service.client("submit")
        assert client.get("/api/jobs").status_code == 200
        tokens.remove(service.db, "submit")
        assert client.get("/api/jobs").status_code == 401

    def test_submitters_steer_their_own_jobs_alone(self, service: Any) -> None:
        number = submit(service.client("submit")).json()["job"]["id"]
        for path in (f"/api/jobs/{number}/cancel", f"/api/jobs/{number}/resume"):
            assert service.client("other").post(path).status_code == 403
        own = service.client("submit")
        assert own.put(f"/api/jobs/{number}/priority", json={"priority": -5}).json()["priority"] == -5
        assert own.put(f"/api/jobs/{number}/priority", json={"priority": 1}).status_code == 403
        cancelled = own.post(f"/api/jobs/{number}/cancel")
        assert (cancelled.json()["state"], cancelled.json()["error"]) == (
            "cancelled", "cancelled with the token submit"
        )  # fmt: skip
        assert own.post(f"/api/jobs/{number}/cancel").status_code == 200
        assert own.put(f"/api/jobs/{number}/priority", json={"priority": -6}).status_code == 409
        assert own.post(f"/api/jobs/{number}/resume").json()["state"] == "queued"
        assert service.client("admin").post(f"/api/jobs/{number}/cancel").json()["state"] == "cancelled"
        assert own.post("/api/jobs/999/cancel").status_code == 404

    def test_without_the_option_nothing_can_be_written(self, filled: Database) -> None:
        with TestClient(create_app(filled)) as client:
            for method, path, body, _ in self.OPERATIONS[:5]:
                assert client.request(method, path, json=body).status_code in (404, 405)
            assert client.get("/submit").status_code == 404


class TestWhatAJobMayReach:
    OUTSIDE = (
    "lmms-eval:docvqa_val",  # a program that would run here
    "lmms-eval:a/../tasks/own",
        "/etc/passwd", "../secret.yaml", "link.yaml", "~/x", "a/../../secret.yaml", ".", "", "x\x00y", "x" * 5000,
        "file:///etc/passwd", "http://127.0.0.1/x",
    )  # fmt: skip

    @pytest.fixture
    def files(self, tmp_path: Path) -> Path:
        files = tmp_path / "laid_out"
        (files / "a").mkdir(parents=True)
        (tmp_path / "secret.yaml").write_text("name: secret")
        (files / "link.yaml").symlink_to(tmp_path / "secret.yaml")
        (files / "text.txt").write_text("text")
        return files

    @pytest.mark.parametrize("admin", [False, True])
    @pytest.mark.parametrize("name", OUTSIDE)
    def test_no_file_outside(self, files: Path, name: str, admin: bool) -> None:
        for change in (
            {"task": name},
            {"task": None, "tasks": ["easy-vqa", name]},
            {"task": None, "tasks": ["easy-vqa", {"task": name, "weight": 2}]},
            {"model": {"path": name}},
            {"collateral": {"tasks": [name]}},
            {"collateral": {"text": name}},
            {"compensation": {"kind": "linear", "text": name}},
        ):
            job = {"model": {"path": "llava-12"}, "task": "easy-vqa"} | change
            with pytest.raises(UsageFault):
                policy.read_job(job, is_admin=admin, files=files)
            with pytest.raises(UsageFault):
                policy.read_job(job, is_admin=admin, files=None)

    def test_what_is_laid_out_is_found(self, files: Path) -> None:
        several = {"model": {"path": "llava-12"}, "tasks": ["easy-vqa", "a.yaml"]}
        (files / "a.yaml").write_text("name: a")
        found = policy.read_job(several, is_admin=False, files=files)
        assert [goal.task for goal in found.tasks] == ["easy-vqa", str(files / "a.yaml")]
        job = {"model": {"path": "llava-12"}, "task": "easy-vqa", "collateral": {"text": "a/../text.txt"}}
        spec = policy.read_job(job, is_admin=False, files=files)
        assert spec.collateral.text == str(files / "text.txt")
        assert policy.read_job(job | {"model": {"path": "org/model"}}, is_admin=False, files=files).model.path == (
            "org/model"
        )

    @pytest.mark.parametrize(
        ("change", "admin_may"),
        [
            ({"database": "sqlite:////tmp/other.db"}, False),
            ({"artifacts": "s3://bucket"}, False),
            ({"cluster": {"address": "ray://192.0.2.1:10001"}}, True),
            ({"cluster": {"workers": 4096}}, True),
            ({"priority": 1}, True),
            ({"model": {"path": "org/model", "trust_remote_code": True}}, True),
            ({"model": {"path": "org/model", "trust_remote_code": False}}, True),
            ({"model": {"path": "org/model", "allow_pickle": ["x.bin"]}}, True),
            ({"model": {"path": "org/model", "revision": "../../../x"}}, False),
            ({"model": {"path": "org/..", "revision": "x"}}, False),
            ({"model": {"path": "../etc"}}, False),
            ({"no_such_field": 1}, False),
            ({"model": {"path": "org/model", "no_such_field": 1}}, False),
            ({"model": "org/model"}, False),
            ({"model": None}, False),
        ],
    )
    def test_fields(self, files: Path, change: dict[str, Any], admin_may: bool) -> None:
        job = {"model": {"path": "llava-12"}, "task": "easy-vqa"} | change
        with pytest.raises(UsageFault):
            policy.read_job(job, is_admin=False, files=files)
        if admin_may:
            policy.read_job(job, is_admin=True, files=files)
        else:
            with pytest.raises(UsageFault):
                policy.read_job(job, is_admin=True, files=files)

    def test_the_environment_s_cluster_counts_and_its_database_does_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SKIPPLAN_CLUSTER_ADDRESS", "192.0.2.7:6379")
        monkeypatch.setenv("SKIPPLAN_DATABASE", "postgresql://user:secret@host/db")
        spec = policy.read_job({"model": {"path": "llava-12"}, "task": "easy-vqa"}, is_admin=False, files=None)
        assert spec.cluster.address == "192.0.2.7:6379"
        assert "secret" not in spec.model_dump_json()

    def test_every_field_was_thought_about(self) -> None:
        """Whoever adds a field that holds a text decides whether a stranger may set it, and whether it names a file."""
        known = policy.FOR_ALL | policy.FOR_ADMINS | policy.OF_THE_SERVICE
        assert known == JobSpec.model_fields.keys()
        texts = {
            f"{name}.{inner}"
            for name in policy.FOR_ALL
            for inner, field in getattr(JobSpec.model_fields[name].annotation, "model_fields", {}).items()
            if "str" in str(field.annotation) and "Literal" not in str(field.annotation)
        }
        assert texts == {
            "model.path", "model.revision", "model.allow_pickle", "collateral.tasks", "collateral.text",
            "compensation.text", "search.strategy", "search.plans", "latency.engine",
        }  # fmt: skip

    def test_a_model_that_is_not_here_is_not_downloaded_by_the_request(
        self, service: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import huggingface_hub

        def only_local(*args: object, **given: object) -> str:
            assert given.get("local_files_only")
            raise OSError("not in the cache")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", only_local)
        answer = submit(service.client("submit"), JOB | {"model": {"path": "org/model"}})
        assert answer.status_code == 201, answer.text


class TestBadRequests:
    @pytest.mark.parametrize(
        ("content", "code"),
        [
            (b"", 422),
            (b"{", 422),
            (b"[]", 422),
            (b'{"job": {}}', 400),
            (b'{"job": []}', 422),
            (b'{"job": {"model": {"path": NaN}, "task": 1}}', 400),
            (b'{"job": {}, "surprise": 1}', 422),
            (b'{"job": {"task": "\\ud800\\u0000", "model": {"path": "llava-12"}}}', 400),
            (b'{"job": {"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}", 400),
            (b'{"job": {"task": ' + b"[" * 600 + b"]" * 600 + b', "model": {"path": "x"}}}', 400),
            (b"\xff\xfe", 400),
        ],
    )
    def test_bodies(self, service: Any, content: bytes, code: int) -> None:
        before = written(service)
        client = service.client("admin")
        answer = client.post("/api/jobs", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code in (code, 400, 422), answer.text[:300]
        assert written(service) == before

    def test_large_bodies_are_refused_before_they_are_read(self, service: Any) -> None:
        client = service.client("submit")
        large = json.dumps({"job": JOB, "force": False}) + " " * LARGEST_BODY
        assert client.post("/api/jobs", content=large).status_code == 413
        sent = []

        def chunks() -> Any:
            for _ in range(10_000):
                sent.append(1)
                yield b" " * 1024

        assert client.post("/api/jobs", content=chunks()).status_code == 413  # without a length
        assert client.post("/login", content=b"token=" + b"x" * LARGEST_BODY).status_code == 413

    @pytest.mark.parametrize("key", ["", " ", "a b", "x" * 201, "ä"])
    def test_keys_that_are_none(self, service: Any, key: str) -> None:
        header = {"Idempotency-Key": key.encode("utf-8")}
        answer = service.client("submit").post("/api/jobs", json={"job": JOB}, headers=header)
        assert answer.status_code == 422


class TestOnce:
    def test_concurrent_requests_with_one_key_are_one_job(self, service: Any) -> None:
        before = len(written(service))

        def ask(_: int) -> Any:
            return submit(service.client("submit"), key="one", force=True)

        with ThreadPoolExecutor(8) as threads:
            answers = list(threads.map(ask, range(24)))
        assert {answer.status_code for answer in answers} == {200, 201}
        assert sum(answer.json()["new"] for answer in answers) == 1
        assert len({answer.json()["job"]["id"] for answer in answers}) == 1
        assert len(written(service)) == before + 1

    def test_another_request_under_the_key_is_refused(self, service: Any) -> None:
        client = service.client("submit")
        assert submit(client, key="k").status_code == 201
        answer = submit(client, JOB | {"priority": -3}, key="k")
        assert (answer.status_code, answer.json()["detail"]) == (
            409, "idempotency key 'k' was used for another request; choose a new one"
        )  # fmt: skip
        assert submit(service.client("other"), JOB | {"priority": -3}, key="k").status_code in (200, 201)


class TestLimits:
    def test_as_many_at_once_as_a_minute_has_and_then_at_its_rate(self) -> None:
        now = [0.0]
        limit = RateLimit(6, clock=lambda: now[0])
        assert [limit.admit("a") for _ in range(6)] == [0] * 6
        assert limit.admit("a") == pytest.approx(10)
        assert limit.admit("b") == 0
        now[0] = 10.0
        assert limit.admit("a") == 0
        assert limit.exhausted("a") == pytest.approx(10)
        now[0] = 1000.0
        assert [limit.admit("a") for _ in range(7)][5:] == [0, pytest.approx(10)]

    def test_it_keeps_few_callers(self) -> None:
        limit = RateLimit(6)
        for number in range(10_000):
            limit.admit(str(number))
        assert len(limit._through) <= 4096

    def test_few_work_few_wait_and_nobody_else(self) -> None:
        room = Room(working=1, waiting=1, seconds=0.2)
        with room.take():
            started = threading.Event()
            codes: list[int] = []

            def wait() -> None:
                started.set()
                try:
                    with room.take():
                        codes.append(200)
                except HTTPException as refused:
                    codes.append(refused.status_code)

            waiting = threading.Thread(target=wait)
            waiting.start()
            started.wait()
            deadline = time.monotonic() + 5
            while room._inside._value and time.monotonic() < deadline:
                time.sleep(0.001)
            with pytest.raises(HTTPException), room.take():
                pytest.fail("three are inside")
            waiting.join()
            assert codes == [503]
        with room.take():
            pass

    def test_writes_of_a_token(self, service: Any) -> None:
        client = service.client("submit")
        codes = [client.post("/api/jobs/999/cancel").status_code for _ in range(70)]
        assert codes[:60] == [404] * 60 and 429 in codes[60:]  # in between, some seconds have passed
        answer = next(each for _ in range(9) if (each := client.post("/api/jobs/999/cancel")).status_code == 429)
        assert int(answer.headers["retry-after"]) >= 1
        assert client.get("/api/jobs").status_code == 200
        assert service.client("other").post("/api/jobs/999/cancel").status_code == 404

    def test_wrong_tokens_from_one_address(self, service: Any) -> None:
        guess = {"Authorization": "Bearer skipplan_0123456789abcdef_" + "x" * 43}
        codes = [service.client().get("/api/jobs", headers=guess).status_code for _ in range(35)]
        assert codes[0] == 401 and codes[-1] == 429
        assert service.client().post("/login", data={"token": "x"}).status_code == 429


class TestBrowser:
    def enter(self, service: Any, role: str) -> TestClient:
        browser = service.client()
        answer = browser.post("/login", data={"token": service.tokens[role]})
        assert answer.status_code == 303
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=strict" in cookie
        assert service.tokens[role] not in cookie
        return browser

    def secret(self, browser: TestClient, path: str = "/submit") -> str:
        page = browser.get(path).text
        return page.split('name="secret" value="')[1].split('"')[0]

    def test_submit_and_cancel(self, service: Any) -> None:
        browser = self.enter(service, "submit")
        form = {"secret": self.secret(browser), "job": "model: {path: llava-12}\ntask: red.yaml\n"}
        answer = browser.post("/submit", data=form, headers={"Origin": "http://testserver"})
        assert answer.status_code == 303, answer.text
        place = answer.headers["location"]
        assert "Cancel this job" in browser.get(place).text
        assert browser.post(f"{place}/cancel", data={"secret": self.secret(browser, place)}).status_code == 303
        assert "Resume this job" in browser.get(place).text
        assert browser.post(f"{place}/resume", data={"secret": self.secret(browser, place)}).status_code == 303
        assert jobs.get(service.db, int(place.rsplit("/", 1)[1])).state == "queued"
        assert "this job</button>" not in self.enter(service, "other").get(place).text
        assert "this job</button>" not in self.enter(service, "read").get(place).text

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ("task: red.yaml", "model: missing"),
            ("model: {path: /etc}\ntask: red.yaml", "neither a bundled model"),
            ("a: &a [1]\nb: *a", "aliases"),
            ("[" * 80_000, "nested too deeply"),
            ("{", "not valid YAML"),
            ("<script>alert(1)</script>", "&lt;script&gt;"),
        ],
    )
    def test_what_is_wrong_is_said_in_the_form(self, service: Any, text: str, told: str) -> None:
        browser = self.enter(service, "submit")
        answer = browser.post("/submit", data={"secret": self.secret(browser), "job": text})
        assert answer.status_code == 400 and told in answer.text
        assert "<script>alert" not in answer.text

    def test_no_other_page_can_send_a_form(self, service: Any) -> None:
        browser, other = self.enter(service, "admin"), self.enter(service, "submit")
        before = written(service)
        own = {"secret": self.secret(browser), "job": json.dumps(JOB)}
        for form in ({"job": own["job"]}, own | {"secret": ""}, own | {"secret": self.secret(other)}):
            assert browser.post("/submit", data=form).status_code == 403
            assert browser.post("/jobs/6/cancel", data=form).status_code == 403
        for headers in (
            {"Origin": "https://evil.example"},
            {"Origin": "null"},
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "same-site"},
        ):
            assert browser.post("/submit", data=own, headers=headers).status_code == 403
        # Not even an own page writes to the API with the cookie: it takes the token itself.
        assert browser.post("/api/jobs/6/cancel").status_code == 401
        assert browser.post("/api/jobs", json={"job": JOB}).status_code == 401
        assert browser.get("/api/jobs").status_code == 200
        assert written(service) == before

    def test_sessions_end(self, service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        browser = self.enter(service, "submit")
        assert browser.get("/").status_code == 200
        cookie = browser.cookies["skipplan_access"]
        as_sent = {"Cookie": f"skipplan_access={cookie}"}
        now = time.time()
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda: now + 13 * 3600)
            assert service.client().get("/", headers=as_sent).status_code == 303
        assert service.client().get("/", headers=as_sent).status_code == 200
        handle, until, signed = cookie.split(".")
        for forged in (f"{handle}.{int(until) + 1}.{signed}", f"{handle}.{until}.{'0' * 64}", f"{handle}.x.{signed}"):
            assert service.client().get("/", headers={"Cookie": f"skipplan_access={forged}"}).status_code == 303
        tokens.remove(service.db, "submit")
        assert service.client().get("/", headers=as_sent).status_code == 303

    def test_readers_are_offered_nothing(self, service: Any) -> None:
        for role in ("read", "dashboard"):
            browser = self.enter(service, role)
            assert 'href="/submit"' not in browser.get("/").text
            assert browser.get("/submit").status_code == 403


class TestExports:
    def test_written_listed_and_downloaded(self, service: Any) -> None:
        number = plans.list_plans(service.db)[0].id
        client = service.client("submit")
        answer = client.post(f"/api/plans/{number}/exports", json={"format": "plan"})
        assert answer.status_code == 201, answer.text
        listed = {file["path"]: file["size"] for file in answer.json()["files"]}
        assert "skipplan.json" in listed
        assert client.post(f"/api/plans/{number}/exports", json={"format": "plan"}).status_code == 200
        reader = service.client("read")
        assert reader.get(f"/api/plans/{number}/exports/plan").json()["files"] == answer.json()["files"]
        for path, size in listed.items():
            content = reader.get(f"/api/plans/{number}/exports/plan/files/{path}").content
            kept = service.app.state.exports / f"plan-{number}-plan" / path
            assert content == kept.read_bytes() and len(content) == size
        (service.app.state.exports / "secret").write_text("x")
        (service.app.state.exports / f"plan-{number}-plan" / "link").symlink_to("../secret")
        base = f"/api/plans/{number}/exports/plan/files/"
        for path in ("../secret", "..%2Fsecret", "%2e%2e/secret", "/etc/passwd", "%2Fetc%2Fpasswd", "link",
                     "skipplan.json/../../secret", "skipplan.json%00"):  # fmt: skip
            assert reader.get(base + path).status_code in (404, 422), path

    def test_what_cannot_be_exported(self, service: Any) -> None:
        client = service.client("submit")
        number = plans.list_plans(service.db)[0].id
        assert client.post("/api/plans/999/exports", json={}).status_code == 404
        assert client.post(f"/api/plans/{number}/exports", json={"format": "../x"}).status_code == 404
        assert client.get(f"/api/plans/{number}/exports/..%2f..").status_code in (400, 404)
        assert client.get(f"/api/plans/{number}/exports/checkpoint").status_code == 404


def test_evaluations_are_downloaded(service: Any) -> None:
    answer = service.client("read").get("/api/jobs/1/evaluations")
    assert answer.headers["content-type"].startswith("text/csv")
    assert len(answer.text.splitlines()) == 15
    assert len(service.client("read").get("/api/jobs/1/evaluations?samples=true").text.splitlines()) > 100


def test_the_interface_s_page_describes_every_operation(service: Any) -> None:
    page = service.client("read").get("/docs").text
    for path in service.app.openapi()["paths"]:
        assert path in page
    assert "Idempotency-Key" in page and 'id="JobRequest"' in page
