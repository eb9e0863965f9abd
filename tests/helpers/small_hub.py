"""A server on loopback that speaks the endpoints of the hub which ``huggingface_hub`` uses to upload a folder."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = 1000
"""Files of more bytes are uploaded apart from the commit, as the hub wants binary ones."""


class SmallHub:
    """Repositories in memory: files by path, of each the content that its commit named."""

    def __init__(self, token: str) -> None:
        self.token = token
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.commits: list[str] = []
        self.requests: list[str] = []
        self.uploaded: list[str] = []
        self.failing_uploads = 0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                path = unquote(urlsplit(self.path).path)
                hub.requests.append(f"{self.command} {self.path}")
                stored = path.startswith("/objects/")  # addresses that are signed, and take no token
                if not stored and self.headers.get("Authorization") != f"Bearer {hub.token}":
                    self.send(401, {"error": "Invalid credentials in Authorization header"})
                    return
                self.send(*hub.respond(self.command, path, body))

            def send(self, status: int, content: Any) -> None:
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.send_header("ETag", f'"{blob(data)}"')
                self.send_header("X-Repo-Commit", hub.commits[-1] if hub.commits else "0" * 40)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_GET = do_HEAD = do_POST = do_PUT = answer

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def respond(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        if path.startswith("/objects/"):
            return self.store(path.rsplit("/", 1)[1], body)
        sent = json.loads(body) if body and not path.endswith("/commit/main") else {}
        if path == "/api/repos/create":
            return self.create(f"{sent['organization']}/{sent['name']}", sent.get("visibility") == "private")
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        repository = path.removeprefix("/api/models/").removeprefix("/").removesuffix(".git/info/lfs/objects/batch")
        repository = "/".join(repository.split("/")[:2])
        if repository not in self.repositories:
            return 404, {"error": "Repository not found"}
        files = self.repositories[repository]
        if path.endswith("/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self.instruct(each) for each in sent["objects"]]}
        if path.endswith("/preupload/main"):
            return 200, {"files": [self.mode(each, files) for each in sent["files"]]}
        if path.endswith("/commit/main"):
            return self.commit(repository, files, [json.loads(line) for line in body.splitlines()])
        if "/resolve/main/" in path:
            return 200, files[path.split("/resolve/main/", 1)[1]]
        if "/tree/main" in path:
            return 200, [
                {"type": "file", "path": name, "size": len(content), "oid": blob(content)}
                for name, content in files.items()
            ]
        return 200, {
            "id": repository,
            "private": self.private[repository],
            "sha": self.commits[-1] if self.commits else "0" * 40,
            "siblings": [{"rfilename": name} for name in files],
            "tags": [],
        }

    def create(self, name: str, private: bool) -> tuple[int, Any]:
        known = name in self.repositories
        self.repositories.setdefault(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.private.setdefault(name, private)
        return (409 if known else 200), {"url": f"{self.url}/{name}", "error": "You already created this model repo"}

    def mode(self, file: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
        there = files.get(file["path"])
        mode = "lfs" if file["size"] > LARGE else "regular"
        oid = None if there is None else (hashlib.sha256(there).hexdigest() if mode == "lfs" else blob(there))
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def instruct(self, thing: dict[str, Any]) -> dict[str, Any]:
        if thing["oid"] in self.objects:
            return thing
        return thing | {"actions": {"upload": {"href": f"{self.url}/objects/{thing['oid']}"}}}

    def store(self, oid: str, body: bytes) -> tuple[int, Any]:
        if self.failing_uploads:
            self.failing_uploads -= 1
            return 400, {"error": "cut off"}
        assert hashlib.sha256(body).hexdigest() == oid
        self.objects[oid] = body
        self.uploaded.append(oid)
        return 200, {}

    def commit(self, repository: str, files: dict[str, bytes], lines: list[dict[str, Any]]) -> tuple[int, Any]:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.commits.append(hashlib.sha1(json.dumps(lines).encode()).hexdigest())
        return 200, {"commitUrl": f"{self.url}/{repository}/commit/{self.commits[-1]}", "commitOid": self.commits[-1]}


def blob(content: bytes) -> str:
    """The name that git gives to a content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serving(token: str) -> Iterator[SmallHub]:
    hub = SmallHub(token)
    thread = threading.Thread(target=hub.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
