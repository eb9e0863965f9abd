"""Serve an OpenVINO export over HTTP in OpenAI's words, one request after another; run by the Python that has it.

OpenVINO comes without a server of its own for what optimum-intel exports. This file imports nothing of the project.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import SimpleQueue
from typing import Any

from optimum.intel import OVModelForVisualCausalLM
from PIL import Image
from transformers import AutoProcessor

PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


class Tokens:
    """Takes tokens from ``generate`` as they come: first the prompt's, then one at a time."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[int | None] = SimpleQueue()
        self._prompt = True

    def put(self, value: Any) -> None:
        """Take the prompt, or the next token."""
        if not self._prompt:
            self.queue.put(int(value.reshape(-1)[0]))
        self._prompt = False

    def end(self) -> None:
        """Take the end."""
        self.queue.put(None)


class Model:
    """The model with its processor."""

    def __init__(self, directory: str, dtype: str, threads: int | None) -> None:
        precision = PRECISIONS[dtype]
        settings: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": precision,
            "KV_CACHE_PRECISION": precision,  # eight bits otherwise
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
            "NUM_STREAMS": "1",
        }
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = str(threads)
        self.model = OVModelForVisualCausalLM.from_pretrained(directory, ov_config=settings)
        self.processor = AutoProcessor.from_pretrained(directory)
        self.lock = threading.Lock()

    def parts(self, asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Answer a request, part by part. Raises ValueError for what cannot be asked."""
        conversation, images = [], 0
        for message in asked["messages"]:
            content = message["content"]
            said = [{"type": "text", "text": content}] if isinstance(content, str) else list(map(_part, content))
            images += sum(each["type"] == "image" for each in said)
            conversation.append({"role": message["role"], "content": said})
        if images != 1:
            raise ValueError(f"one image a request is served, not {images}")
        inputs = self.processor.apply_chat_template(
            [conversation], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        prompt = inputs["input_ids"][0].tolist()
        most, top = int(asked["max_tokens"]), int(asked.get("top_logprobs") or 0)
        options: dict[str, Any] = {"min_new_tokens": most} if asked.get("ignore_eos") else {}
        with self.lock:
            if top:
                yield from self._with_logprobs(inputs, most, top, options)
            else:
                yield from self._streamed(inputs, most, options)
        yield {"choices": [], "prompt_token_ids": prompt, "usage": {"prompt_tokens": len(prompt)}}

    def _streamed(self, inputs: Any, most: int, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
        tokens, failed = Tokens(), []

        def generate() -> None:
            try:
                self.model.generate(**inputs, max_new_tokens=most, do_sample=False, streamer=tokens, **options)
            except Exception as error:  # raised again where the answer is read
                failed.append(error)
                tokens.end()

        thread = threading.Thread(target=generate)
        thread.start()
        said: list[int] = []
        while (token := tokens.queue.get()) is not None:
            said.append(token)
            yield self._part_of(said, None)
        thread.join()
        if failed:
            raise failed[0]
        yield self._end(said, most)

    def _with_logprobs(self, inputs: Any, most: int, top: int, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
        found = self.model.generate(
            **inputs, max_new_tokens=most, do_sample=False, return_dict_in_generate=True, output_logits=True, **options
        )
        said: list[int] = []
        for token, logits in zip(found.sequences[0, -len(found.logits) :].tolist(), found.logits, strict=True):
            said.append(token)
            logprobs = logits[0].float().log_softmax(-1)
            likely = [(int(each), float(logprobs[each])) for each in logprobs.topk(top).indices]
            own = self._entry(token, float(logprobs[token]))
            own["top_logprobs"] = [self._entry(*each) for each in likely]
            yield self._part_of(said, own)
        yield self._end(said, most)

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self.processor.tokenizer.decode([token]), "id": token, "logprob": logprob}

    def _part_of(self, said: list[int], logprobs: dict[str, Any] | None) -> dict[str, Any]:
        text, before = (self.processor.tokenizer.decode(each, skip_special_tokens=True) for each in (said, said[:-1]))
        choice: dict[str, Any] = {"delta": {"content": text[len(before) :]}, "token_ids": said[-1:]}
        return {"choices": [choice | ({"logprobs": {"content": [logprobs]}} if logprobs else {})]}

    def _end(self, said: list[int], most: int) -> dict[str, Any]:
        reason = "length" if len(said) == most else "stop"
        return {"choices": [{"delta": {}, "finish_reason": reason}], "usage": {"completion_tokens": len(said)}}


def _part(content: dict[str, Any]) -> dict[str, Any]:
    if content["type"] == "text":
        return {"type": "text", "text": content["text"]}
    if content["type"] != "image_url":
        raise ValueError(f"{content['type']} is not served: text and images are")
    data = base64.b64decode(content["image_url"]["url"].partition(";base64,")[2])
    return {"type": "image", "image": Image.open(io.BytesIO(data)).convert("RGB")}


def handler(model: Model, name: str) -> type[BaseHTTPRequestHandler]:
    """Return what answers the requests of one connection."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Write no line a request, as http.server does by default."""

        def _reply(self, code: int, body: dict[str, Any]) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def do_GET(self) -> None:
            """Name the model."""
            self._reply(200, {"data": [{"id": name}]})

        def do_POST(self) -> None:
            """Stream the answer."""
            usage: dict[str, int] = {}
            begun = False
            try:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                for part in model.parts(asked):
                    if not begun:
                        self.send_response(200)
                        self.end_headers()
                        begun = True
                    usage |= part.get("usage", {})
                    self._send(part | ({"usage": usage} if "usage" in part else {}))
                self.wfile.write(b"data: [DONE]\n\n")
            except BrokenPipeError:
                return
            except Exception as error:  # whatever it is, who asked is told
                message = {"error": {"message": f"{type(error).__name__}: {error}"}}
                self._send(message) if begun else self._reply(400, message)

        def _send(self, part: dict[str, Any]) -> None:
            self.wfile.write(b"data: " + json.dumps(part).encode() + b"\n\n")
            self.wfile.flush()

    return Handler


class Server(ThreadingHTTPServer):
    """A server at whose door as many may wait as are asked at once."""

    request_queue_size = 4096


def main() -> None:
    """Load the model and answer until the process is ended."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--dtype", choices=PRECISIONS, required=True)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    model = Model(given.directory, given.dtype, given.threads)
    Server(("127.0.0.1", given.port), handler(model, given.name)).serve_forever()


if __name__ == "__main__":
    main()
