"""Hooks: every change of a job's state is told at least once, signed, and to no address that is not public."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from sqlalchemy import text

from optimizer.job.spec import JobSpec
from optimizer.service import hooks
from optimizer.service.hooks import Undelivered, deliver_due, find_addresses, is_public
from optimizer.service.pool import _without_secrets
from optimizer.service.server import Server
from optimizer.stages.progress import Progress, StageLines
from storage.database import Database
from storage.queue import deliveries, jobs, leases

SECRET = "a secret between two"


class Receiver:
    """A server on loopback that keeps what it is sent, and answers with the statuses given, the last one for ever."""

    def __init__(self) -> None:
        self.taken: list[tuple[dict[str, str], bytes]] = []
        self.statuses = [200]
        self.headers: dict[str, str] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.taken.append((dict(self.headers), body))
                self.send_response(outer.statuses.pop(0) if len(outer.statuses) > 1 else outer.statuses[0])
                for name, value in outer.headers.items():
                    self.send_header(name, value)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook?x=1"

    def told(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, body in self.taken]


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    monkeypatch.setenv(hooks.SECRET, SECRET)
    monkeypatch.setenv(hooks.PRIVATE, "1")
    opened = Receiver()
    yield opened
    opened.server.shutdown()
    opened.server.server_close()


def spec(*targets: str) -> dict[str, Any]:
    return {"model": {"path": "llava-12"}, "task": "easy-vqa", "notify": list(targets)}


def make_due(db: Database) -> None:
    with db.transaction() as session:
        session.execute(text("UPDATE hook_deliveries SET next_at = created_at WHERE next_at IS NOT NULL"))


def test_a_job_s_life_is_told_and_signed(db: Database, receiver: Receiver) -> None:
    job = jobs.submit(db, spec(receiver.url), "hash")
    claimed = leases.claim(db, "me", 60)
    assert claimed is not None
    leases.infeasible(db, claimed, "no plan meets the constraint")
    assert deliver_due(db) == 3
    assert [(told["event"], told["state"], told["job"]) for told in receiver.told()] == [
        ("queued", "queued", job.id), ("running", "running", job.id), ("ended", "infeasible", job.id)
    ]  # fmt: skip
    assert receiver.told()[2]["text"] == (
        f"skipplan job {job.id} (llava-12 on easy-vqa) is infeasible: no plan meets the constraint"
    )
    for headers, body in receiver.taken:
        moment, signature = (part.split("=")[1] for part in headers["X-Skipplan-Signature"].split(","))
        expected = hmac.new(SECRET.encode(), f"{moment}.".encode() + body, hashlib.sha256).hexdigest()
        assert hmac.compare_digest(signature, expected)
        assert headers["X-Skipplan-Delivery"] == str(json.loads(body)["delivery"])
    assert deliver_due(db) == 0
    assert all(each.delivered_at and not each.error for each in deliveries.for_job(db, job.id))


@pytest.mark.parametrize(
    ("steps", "events"),
    [
        (lambda db, job: jobs.cancel(db, job.id), ["queued", "ended"]),
        (lambda db, job: (jobs.cancel(db, job.id), jobs.resume(db, job.id)), ["queued", "ended", "queued"]),
        (lambda db, job: leases.release(db, leases.claim(db, "me", 60)), ["queued", "running", "queued"]),
        (lambda db, job: leases.retry(db, leases.claim(db, "me", 60), "away", 5), ["queued", "running", "queued"]),
        (lambda db, job: leases.fail(db, leases.claim(db, "me", 60), "no"), ["queued", "running", "ended"]),
        (lambda db, job: jobs.prioritize(db, job.id, 3), ["queued"]),
        (lambda db, job: (leases.claim(db, "me", -1), leases.requeue_expired(db)), ["queued", "running", "queued"]),
    ],
)
def test_every_change_of_state_is_a_message(db: Database, steps: Any, events: list[str]) -> None:
    job = jobs.submit(db, spec("command"), "hash")
    steps(db, job)
    assert [each.payload["event"] for each in deliveries.for_job(db, job.id)] == events


def test_several_tasks_are_named(db: Database) -> None:
    job = jobs.submit(db, spec("command") | {"task": None, "tasks": [{"task": "b"}, {"task": "a"}]}, "hash")
    assert deliveries.for_job(db, job.id)[0].payload["task"] == "a+b"


def test_jobs_without_hooks_tell_nobody(db: Database) -> None:
    job = jobs.submit(db, {"model": {"path": "m"}, "task": "t"}, "hash")
    assert deliveries.for_job(db, job.id) == []


def test_what_did_not_arrive_is_sent_again_with_pauses_and_at_last_given_up(
    db: Database, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver.statuses = [500, 404, 200]
    job = jobs.submit(db, spec(receiver.url), "hash")
    assert [deliver_due(db), deliver_due(db)] == [1, 0]  # it waits
    (waiting,) = deliveries.for_job(db, job.id)
    assert waiting.error == "127.0.0.1 answered with status 500" and waiting.next_at is not None
    make_due(db)
    deliver_due(db)
    make_due(db)
    deliver_due(db)
    assert len(receiver.taken) == 3
    assert len({json.loads(body)["delivery"] for _, body in receiver.taken}) == 1
    monkeypatch.setattr(hooks, "MOST_ATTEMPTS", 2)
    receiver.statuses = [500]
    jobs.cancel(db, job.id)
    for _ in range(4):
        deliver_due(db)
        make_due(db)
    lost = deliveries.for_job(db, job.id)[1]
    assert (lost.attempts, lost.next_at, lost.delivered_at) == (2, None, None)


def test_pauses_double_to_an_hour(db: Database, receiver: Receiver) -> None:
    receiver.statuses = [503]
    job = jobs.submit(db, spec(receiver.url), "hash")
    pauses = []
    for _ in range(12):
        deliver_due(db)
        with db.reading() as session:
            (now,) = session.execute(text("SELECT CURRENT_TIMESTAMP")).one()
        (waiting,) = deliveries.for_job(db, job.id)
        assert waiting.next_at is not None
        from datetime import UTC, datetime

        now = datetime.fromisoformat(now).replace(tzinfo=UTC) if isinstance(now, str) else now
        pauses.append((waiting.next_at - now).total_seconds())
        make_due(db)
    assert pauses == pytest.approx([5, 10, 20, 40, 80, 160, 320, 640, 1280, 2560, 3600, 3600], abs=3)


def test_a_message_of_a_sender_that_died_is_due_again(db: Database, receiver: Receiver) -> None:
    jobs.submit(db, spec(receiver.url), "hash")
    assert deliveries.claim(db, 60) is not None  # and nothing more is heard of who took it
    assert deliver_due(db) == 0
    make_due(db)
    assert deliver_due(db) == 1
    assert len(receiver.taken) == 1


def test_several_senders_share_the_messages(db: Database, receiver: Receiver) -> None:
    for number in range(20):
        jobs.submit(db, spec(receiver.url), f"hash {number}")
    threads = [threading.Thread(target=deliver_due, args=(db,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(told["delivery"] for told in receiver.told()) == sorted(
        {told["delivery"] for told in receiver.told()}
    )
    assert len(receiver.taken) == 20


def test_redirects_are_not_followed(db: Database, receiver: Receiver) -> None:
    receiver.statuses = [307]
    receiver.headers = {"Location": receiver.url + "&elsewhere"}
    job = jobs.submit(db, spec(receiver.url), "hash")
    deliver_due(db)
    assert len(receiver.taken) == 1
    assert deliveries.for_job(db, job.id)[0].error == "127.0.0.1 answered with status 307"


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "127.9.9.9", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "100.64.0.1",
     "224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fd00::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1",
     "2002:7f00:1::", "64:ff9b::7f00:1", "64:ff9b::8.8.8.8", "ff02::1", "2001:db8::1"],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_addresses_that_are(address: str) -> None:
    assert is_public(address)


class TestPrivateAddresses:
    @pytest.fixture(autouse=True)
    def closed(self, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(hooks.PRIVATE)

    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "127.1", "[::1]", "0"])
    def test_they_are_not_told(self, db: Database, receiver: Receiver, host: str) -> None:
        job = jobs.submit(db, spec(f"http://{host}:{receiver.server.server_port}/"), "hash")
        deliver_due(db)
        assert receiver.taken == []
        error = deliveries.for_job(db, job.id)[0].error
        assert error is not None and ("private network" in error or "no such host" in error)

    def test_one_private_address_among_public_ones_is_enough(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = [(2, 1, 6, "", ("8.8.8.8", 80)), (2, 1, 6, "", ("10.0.0.1", 80))]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        with pytest.raises(Undelivered, match="private network"):
            find_addresses("example.org", 80)

    def test_a_name_is_resolved_once(self, db: Database, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
        """A name that is public when it is looked at, and this machine when it is connected to."""
        asked: list[str] = []
        connected: list[tuple[str, int]] = []

        def resolve(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
            asked.append(host)
            return [(2, 1, 6, "", ("192.0.2.1" if len(asked) > 1 else "8.8.8.8", port))]

        def connect(address: tuple[str, int], timeout: float) -> socket.socket:
            connected.append(address)
            raise OSError("not in this test")

        monkeypatch.setattr(hooks.socket, "getaddrinfo", resolve)
        monkeypatch.setattr(hooks.socket, "create_connection", connect)
        jobs.submit(db, spec("http://rebound.example/"), "hash")
        deliver_due(db)
        assert (asked, connected) == (["rebound.example"], [("8.8.8.8", 80)])


def test_a_host_s_next_address_is_tried(db: Database, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one of IPv4 behind one of IPv6, on a machine that speaks IPv4 alone."""
    port = receiver.server.server_port
    found = [(10, 1, 6, "", ("::1", 9, 0, 0)), (2, 1, 6, "", ("127.0.0.1", port))]
    monkeypatch.setattr(hooks.socket, "getaddrinfo", lambda *_, **__: found)
    jobs.submit(db, spec(receiver.url), "hash")
    deliver_due(db)
    assert len(receiver.taken) == 1


def test_nothing_is_sent_unsigned(db: Database, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(hooks.SECRET)
    job = jobs.submit(db, spec(receiver.url), "hash")
    deliver_due(db)
    assert receiver.taken == []
    assert "SKIPPLAN_HOOK_SECRET is not set" in (deliveries.for_job(db, job.id)[0].error or "")


def test_a_slow_answer_ends(db: Database, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that sends a byte now and then never lets a timeout between two bytes pass."""
    monkeypatch.setattr(hooks, "SEND_SECONDS", 0.5)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def drip() -> None:
            opened, _ = listener.accept()
            with opened:
                for _ in range(100):
                    try:
                        opened.sendall(b"H")
                    except OSError:
                        return
                    threading.Event().wait(0.1)

        threading.Thread(target=drip, daemon=True).start()
        job = jobs.submit(db, spec(f"http://127.0.0.1:{listener.getsockname()[1]}/"), "hash")
        deliver_due(db)
    assert deliveries.for_job(db, job.id)[0].error


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_a_slow_answer_ends_over_https(
    db: Database, receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setattr(hooks, "SEND_SECONDS", 0.5)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    sent: list[bytes] = []
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def drip() -> None:
            opened, _ = listener.accept()
            with context.wrap_socket(opened, server_side=True) as wrapped, suppress(OSError):
                for _ in range(50):
                    wrapped.sendall(b"H")
                    sent.append(b"H")
                    threading.Event().wait(0.1)

        threading.Thread(target=drip, daemon=True).start()
        job = jobs.submit(db, spec(f"https://127.0.0.1:{listener.getsockname()[1]}/"), "hash")
        began = time.monotonic()
        deliver_due(db)
    assert time.monotonic() - began < 3
    assert sent and deliveries.for_job(db, job.id)[0].error


def test_the_service_s_command_is_run(db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = jobs.submit(db, spec("command"), "hash")
    deliver_due(db)
    assert "SKIPPLAN_HOOK_COMMAND names none here" in (deliveries.for_job(db, job.id)[0].error or "")
    monkeypatch.setenv(hooks.COMMAND, f"tee '{tmp_path}/with space.json'")
    make_due(db)
    deliver_due(db)
    assert json.loads((tmp_path / "with space.json").read_text())["event"] == "queued"
    monkeypatch.setenv(hooks.COMMAND, "false")
    jobs.cancel(db, job.id)
    deliver_due(db)
    assert "ended with exit code 1" in (deliveries.for_job(db, job.id)[1].error or "")


@pytest.mark.parametrize(
    "target",
    ["commands", "ftp://example.org/", "https://", "https://user:password@example.org/", "https://x y/", "/bin/sh",
     "https://example.org:0/", "https://example.org:99999/", "https://example.org/\r\nX: y", "file:///etc/passwd",
     "https://ex\u00e4mple.org/", "https://e/" + "x" * 2000],
)  # fmt: skip
def test_hooks_that_a_job_file_cannot_name(target: str) -> None:
    with pytest.raises(ValidationError):
        JobSpec.model_validate({"model": {"path": "llava-12"}, "task": "easy-vqa", "notify": [target]})


def test_messages_are_sent_while_something_runs_and_at_its_end(db: Database, receiver: Receiver) -> None:
    with hooks.delivering(db):
        job = jobs.submit(db, spec(receiver.url), "hash")
        jobs.cancel(db, job.id)
    assert [told["event"] for told in receiver.told()] == ["queued", "ended"]


def test_a_service_tells_of_the_jobs_that_it_takes(db: Database, receiver: Receiver) -> None:
    lines = StageLines(lambda *_: None, lambda _: None)
    jobs.submit(db, spec(receiver.url) | {"task": "no-such-task"}, "hash")
    assert Server(db, progress=lambda _: Progress(lines)).run(once=True) == 1
    assert [(told["event"], told["state"]) for told in receiver.told()] == [
        ("queued", "queued"),
        ("running", "running"),
        ("ended", "failed"),
    ]


def test_the_secret_is_kept_from_ray_and_signs_meanwhile(db: Database, receiver: Receiver) -> None:
    with hooks.delivering(db), _without_secrets():
        assert hooks.SECRET not in os.environ
        jobs.submit(db, spec(receiver.url), "hash")
        deadline = time.monotonic() + 20
        while not receiver.taken and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(receiver.taken) == 1
    assert os.environ[hooks.SECRET] == SECRET
