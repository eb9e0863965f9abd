"""Build, run and time one request and its parts, and count its cache.

A request is one ``generate`` call on prompts of the task, prefill and a forced number of new tokens, with everything a
caller pays for but the processor.
"""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from workers.errors import MeasurementError
from workers.layerwise.hooks import Hooks
from workers.messages import Workload
from workers.models.inputs import prepare_batch
from workers.models.loading import LoadedModel
from workers.models.prompts import to_device
from workers.runtime.hooked import execution_device
from workers.tasks import Task


@dataclass(frozen=True)
class PreparedRequest:
    """Model inputs on the device and the number of tokens to generate."""

    inputs: dict[str, Any]
    new_tokens: int
    failed_samples: dict[str, str] = field(default_factory=dict)
    """Samples that came first, and why they cannot be asked."""

    @property
    def prompt_tokens(self) -> int:
        """Length of the padded prompts."""
        return int(self.inputs["input_ids"].shape[1])


def device_name(*devices: torch.device) -> str:
    """Name what latency depends on: the GPUs, or the processor and torch's threads."""
    if devices[0].type == "cuda":
        names = Counter(str(torch.cuda.get_device_name(device)) for device in devices)
        return ", ".join(name if count == 1 else f"{count} x {name}" for name, count in names.items())
    threads = torch.get_num_threads()
    return f"{_processor_name()}, {threads} thread{'s' if threads > 1 else ''}"


def prepare_request(loaded: LoadedModel, task: Task, workload: Workload) -> PreparedRequest:
    """Build the request from the first calibration samples whose images open.

    Raises:
        MeasurementError: the split has too few for the batch size.
    """
    if workload.batch_size < 1 or workload.new_tokens < 1:
        raise MeasurementError("a workload needs a batch_size and new_tokens of at least 1")
    samples = task.calibration
    start = 0
    usable: list[Any] = []
    failed: dict[str, str] = {}
    while len(usable) < workload.batch_size and start < len(samples):
        chunk = samples[start : start + workload.batch_size]
        prepared = prepare_batch(loaded, task, chunk)
        usable += prepared.samples
        failed |= prepared.failed
        start += len(chunk)
    if len(usable) < workload.batch_size:
        raise MeasurementError(
            f"the calibration split has {len(usable)} usable samples, fewer than the batch_size {workload.batch_size}"
        )
    batch = prepare_batch(loaded, task, usable[: workload.batch_size])
    assert batch.inputs is not None
    return PreparedRequest(to_device(batch.inputs, loaded.device, loaded.model.dtype), workload.new_tokens, failed)


def run_request(loaded: LoadedModel, request: PreparedRequest) -> Any:
    """Generate exactly ``new_tokens`` tokens greedily; return the library's output with its KV cache."""
    with torch.inference_mode(), loaded.states_left_in_place():
        return loaded.model.generate(
            **request.inputs,
            do_sample=False,
            num_beams=1,
            min_new_tokens=request.new_tokens,
            max_new_tokens=request.new_tokens,
            pad_token_id=loaded.processor.tokenizer.pad_token_id,
            use_cache=True,  # checkpoints often say no, left over from training; whoever serves them has one
            return_dict_in_generate=True,
        )


def time_request(loaded: LoadedModel, request: PreparedRequest) -> float:
    """Seconds of one request, the device idle before and after."""
    synchronise(*loaded.devices)
    started = time.perf_counter()
    run_request(loaded, request)
    synchronise(*loaded.devices)
    return time.perf_counter() - started


def cache_of(output: Any) -> Any:
    """Return the KV cache in what ``generate`` returned, which transformers before 5.24 calls ``past_key_values``."""
    return output.cache if "cache" in output else output.past_key_values


CACHE_CODE = ("transformers.", "workers.runtime.")
"""Where the classes of caches and of their entries are from; those of bypassed layers are the runtime's."""


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors that a KV cache object holds, each storage counted once."""
    storages: dict[int, int] = {}
    seen: set[int] = set()

    def visit(value: Any) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)
        elif type(value).__module__.startswith(CACHE_CODE) and hasattr(value, "__dict__"):
            visit(vars(value))

    visit(cache)
    return sum(storages.values())


@dataclass(frozen=True)
class RequestTimes:
    """Seconds of one request and of its parts.

    ``model[call]`` is a forward call of the model, the first of them the prefill; ``layers[layer][call]`` a decoder
    layer's part in it.
    """

    total: float
    model: tuple[float, ...]
    layers: tuple[tuple[float, ...], ...]


@dataclass
class RequestTimer:
    """Start and end marks of every call of the model and of its decoder layers.

    On a GPU they are CUDA events. On the CPU with one thread they are that thread's own CPU time: what other processes
    take from a shared core would otherwise fall on some layers and not on others. With more threads, wall time.
    """

    devices: tuple[torch.device, ...]
    """Those of the model, that of its inputs first."""
    marks: list[list[Any]] = field(default_factory=list)
    """Per watched module its starts and ends in turns; the model is the first."""

    @classmethod
    @contextmanager
    def watching(cls, loaded: LoadedModel, stack_path: str) -> Iterator[RequestTimer]:
        """Watch the model and every decoder layer that stands in the stack now."""
        timer = cls(loaded.devices)

        def mark(marks: list[Any], device: torch.device, *_: object) -> None:
            marks.append(timer.now(device))

        with Hooks() as hooks:
            for module in (loaded.model, *loaded.model.get_submodule(stack_path).children()):
                marks: list[Any] = []
                timer.marks.append(marks)
                device = loaded.device if module is loaded.model else execution_device(module, loaded.device)
                hooks.before(module, partial(mark, marks, device))
                hooks.after(module, partial(mark, marks, device))
            yield timer

    def now(self, device: torch.device) -> Any:
        """Mark the present moment, on a GPU when all that the model's other GPUs were given before is done."""
        if device.type == "cuda":
            stream = torch.cuda.current_stream(device)
            for other in self.devices:
                if other != device:
                    stream.wait_stream(torch.cuda.current_stream(other))
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(stream)
            return event
        return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()

    def time(self, request: Callable[[], object]) -> RequestTimes:
        """Run a request, the device idle before and after."""
        synchronise(*self.devices)
        start = self.now(self.devices[0])
        request()
        end = self.now(self.devices[0])
        synchronise(*self.devices)
        model, *layers = (tuple(map(self._between, marks[::2], marks[1::2])) for marks in self.marks)
        return RequestTimes(self._between(start, end), model, tuple(layers))

    def _between(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end) / 1000 if self.devices[0].type == "cuda" else end - start)


def synchronise(*devices: torch.device) -> None:
    """Wait until devices have done all they were given."""
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
