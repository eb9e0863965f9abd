"""An engine whose program is a page of standard library: it answers in OpenAI's words, and fails where it is told to.

Real engines are started in ``tests/workers/engines/test_real_engines.py``; this one can be made to die at a given
moment.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from workers.engines.client import ChatServer
from workers.engines.interface import Installed, Server, Serving
from workers.engines.process import LOOPBACK, choose_port, running
from workers.text import last_line

PROGRAM = r"""
import json, os, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
port, model, fault, wait = int(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4])
if fault == "no start":
    sys.exit("weights: there is no tensor named head")
if fault == "never ready":
    time.sleep(60)
WORDS = ["a", " b", " c", " d", " e", " f"]
class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def reply(self, code, body):
        self.send_response(code); self.end_headers(); self.wfile.write(json.dumps(body).encode())
    def do_GET(self):
        self.reply(200, {"data": [{"id": "another" if fault == "other model" else model}]})
    def part(self, body):
        self.wfile.write(b"data: " + json.dumps(body).encode() + b"\n\n"); self.wfile.flush()
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = asked["messages"][0]["content"]
        if fault == "refuses":
            return self.reply(400, {"error": {"message": "At most 0 image(s)\nmay be provided"}})
        if fault == "silent":
            time.sleep(60)
        self.send_response(200); self.end_headers()
        if fault == "refuses later":
            return self.part({"error": {"message": "out of blocks", "code": 500}})
        top, count = asked.get("top_logprobs"), asked["max_tokens"]
        text = ["%d images" % sum(each["type"] == "image_url" for each in content), *WORDS][:count]
        for number, word in enumerate(text):
            if fault == "dies" and number:
                os._exit(7)
            likely = [{"token": word, "id": number, "logprob": -0.1 - at} for at in range(top or 0)]
            logprobs = {"content": [{**likely[0], "top_logprobs": likely}]} if top else None
            self.part({"choices": [{"delta": {"content": word}, "logprobs": logprobs}]})
            time.sleep(wait)
        self.part({"choices": [{"delta": {}, "finish_reason": "length"}]})
        self.part({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": len(text)}})
        self.wfile.write(b"data: [DONE]\n\n")
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


class ScriptedEngine:
    """``fault`` is one of those of the program, or empty.

    A token takes 0.02 seconds, or so many for each decoder layer of the served checkpoint.
    """

    name, export_format = "scripted", "checkpoint"

    def __init__(self, fault: str = "", *, layer_seconds: float | None = None) -> None:
        self.fault, self.layer_seconds = fault, layer_seconds
        self.served: list[tuple[int, Serving]] = []
        """Layers of what was served, and how."""

    def installed(self) -> Installed:
        return Installed("1", sys.executable)

    @contextmanager
    def serve(self, directory: Path, serving: Serving) -> Iterator[Server]:
        port, model = choose_port(serving.port), uuid4().hex
        seconds = 0.02
        if self.layer_seconds is not None:
            config = json.loads((directory / "config.json").read_text())
            self.served.append((config["text_config"]["num_hidden_layers"], serving))
            seconds = self.layer_seconds * self.served[-1][0]
        command = [sys.executable, "-I", "-c", PROGRAM, str(port), model, self.fault, str(seconds)]
        with running(self.name, command, {}) as process:
            server = ChatServer("1", process, f"http://{LOOPBACK}:{port}", model, serving.request_timeout_seconds)
            with server.client:
                process.await_ready(server.ready, serving.start_timeout_seconds, lambda log: last_line(log, "nothing"))
                yield server
