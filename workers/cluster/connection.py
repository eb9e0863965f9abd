"""Connect to a Ray cluster or start a local one, and check that it has what was asked for."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

import ray

from workers.errors import ClusterAway, ClusterError, ClusterLost
from workers.text import first_line, last_line, one_line

from .settings import LOCAL, ClusterSettings
from .telemetry import log

GIB = 1 << 30
UNLIMITED = 1 << 20
"""Workers that take no resources fit as often as one likes."""

MISSED_CALLS = 3
"""Times in a row that the head must not answer before it is taken for gone."""


@dataclass(frozen=True)
class Allotment:
    """Number of workers, and what each gets."""

    workers: int
    cpus: float
    gpus: float
    memory: float = 0.0
    """In bytes."""

    @property
    def each(self) -> dict[str, float]:
        """Resources of one worker, by Ray's names."""
        return {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory}

    def fits_in(self, resources: Mapping[str, float]) -> int:
        """Count the workers that ``resources`` have room for; UNLIMITED for workers that take nothing."""
        rooms = [int(resources.get(kind, 0.0) / need + 1e-9) for kind, need in self.each.items() if need > 0]
        return min(rooms, default=UNLIMITED)


def connect(settings: ClusterSettings, *, cpus: int | None = None) -> bool:
    """Connect this process to the cluster, unless it is connected to one already.

    ``cpus`` is how many CPUs a local cluster counts, by default those of the machine.

    Returns whether a connection was made, so that who made it can end it with :func:`disconnect`.

    A local cluster uses token authentication, and it is an error if Ray does not turn it on: Ray keeps the token in
    the user's home, and nobody else on the machine can give the cluster work. ``RAY_AUTH_MODE=disabled`` in the
    environment is the only way to do without; for any other address the environment decides alone.

    Raises:
        ClusterError: nothing answers at the address, within ``connect_timeout_seconds``; ClusterLost where a local
            cluster does not start.
    """
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Workers without a GPU are told so by us; Ray need not warn that it leaves their environment alone.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    logging.getLogger("ray").setLevel(logging.ERROR)
    # What a cluster has to say, such as that a worker died, Ray prints to standard output whatever it is told: that is
    # for results, so it becomes an event of the log. There is no public way to have it so.
    ray._private.worker.print_to_stdstream = _log_message
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if settings.address == LOCAL:
            with _own_signal_handlers():
                ray.init(address=LOCAL, num_cpus=cpus, include_dashboard=False, **quiet)
        else:
            _probe(settings.address, settings.connect_timeout_seconds)
            _probe_in_subprocess(settings.address, settings.connect_timeout_seconds)
            with _own_signal_handlers():
                ray.init(address=settings.address, **quiet)
    except ClusterError:
        raise
    except Exception as error:  # Ray raises ConnectionError, RuntimeError, ValueError, its own kinds, and ImportError
        long = "AF_UNIX path length" in str(error)  # the sockets that Ray makes lie deep below it
        remedy = "; set RAY_TMPDIR to a directory with a short path, such as /tmp" if long else ""
        # A local one that does not start has lost a process, or the machine is busy: no job is to blame for it.
        kind = ClusterLost if settings.address == LOCAL and not long else ClusterError
        raise kind(f"cluster {settings.address}: cannot be used: {first_line(error)}{remedy}") from None
    if settings.address == LOCAL and os.environ.get("RAY_AUTH_MODE", "").lower() not in ("token", "disabled"):
        disconnect()
        raise ClusterError("cluster local: Ray started without token authentication; set RAY_AUTH_MODE=token")
    return True


def disconnect() -> None:
    """End this process's connection, and the cluster with it if it is a local one."""
    with _own_signal_handlers():
        ray.shutdown()


@contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Put back the handlers that this process stops by.

    Ray puts one of its own in the place of SIGTERM's when it starts. When it ends, its core gives SIGTERM back to the
    system behind Python's back: `signal.getsignal` still names the handler, but the process would simply die.
    """
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for each, handler in before.items():
                if callable(handler) and not str(getattr(handler, "__module__", "")).startswith("ray."):
                    signal.signal(each, handler)


def allot(settings: ClusterSettings, *, model_device: str) -> Allotment:
    """Decide what each worker gets from what the connected cluster has.

    Raises:
        ClusterError: it has less than was asked for; the message says what is missing.
    """
    there = ray.cluster_resources()
    gpus = there.get("GPU", 0.0)
    gpus_each = settings.gpus_per_worker
    if gpus_each is None:
        gpus_each = 1.0 if gpus >= 1 and model_device != "cpu" else 0.0
    if model_device == "cuda" and (gpus == 0 or gpus_each == 0):
        raise ClusterError(
            f"cluster: the model is to run on a GPU; the cluster has {gpus:g}, each worker gets {gpus_each:g}"
        )
    one = Allotment(1, settings.cpus_per_worker, gpus_each, (settings.memory_per_worker or 0.0) * GIB)
    fits = room(one)
    workers = settings.workers or (1 if fits == UNLIMITED else max(1, fits))
    if workers > fits:
        raise ClusterError(_missing(one, workers, there))
    return replace(one, workers=workers)


def room(allotment: Allotment) -> int:
    """Count the workers that the cluster's nodes have room for when they are idle; a worker runs on one node."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return min(UNLIMITED, sum(allotment.fits_in(resources) for resources in nodes))


def _missing(one: Allotment, workers: int, there: Mapping[str, float]) -> str:
    memory = f" and {one.memory / GIB:g} GiB of memory" if one.memory else ""
    what = f"cluster: {workers} workers with {one.cpus:g} CPUs and {one.gpus:g} GPUs{memory} each"
    for kind, each in one.each.items():
        unit, scale = ("GiB of memory", GIB) if kind == "memory" else (f"{kind}s", 1)
        needed, available = workers * each / scale, there.get(kind, 0.0) / scale
        if needed > available + 1e-9:
            return f"{what} need {needed:g} {unit}, the cluster has {available:g}; missing {needed - available:g}"
    return f"{what}: the cluster has as much in all, but its nodes have room for {room(one)} such workers only"


class HeadWatch:
    """Watch over the cluster's head node and this machine's own node.

    Ray itself waits for a head that does not come back, and after a minute ends the whole process.
    """

    def __init__(self, address: str) -> None:
        context = ray.get_runtime_context()
        # A client of ray:// knows the head by its proxy only, and learns of its end from every call.
        self._head = None if address.startswith("ray://") else str(context.gcs_address)
        self._node = context.get_node_id()
        self._address, self._missed = address, 0

    def check(self, *, counts: bool = True) -> None:
        """Ask whether the head answers and has this machine's node.

        Raises ClusterLost when the node is gone, and the third time in a row that the head does not answer;
        ``counts=False`` asks in between, so that many questions at one moment are not taken for a long silence.
        """
        if self._head is None:
            return
        host, _, port = self._head.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
        except OSError:
            self._missed += counts
            if self._missed >= MISSED_CALLS:
                raise ClusterLost(f"cluster {self._address}: its head node does not answer any more") from None
            return
        self._missed = 0
        if not any(node["NodeID"] == self._node and node["Alive"] for node in ray.nodes()):
            raise ClusterLost(f"cluster {self._address}: this machine's Ray node is gone")

    @property
    def steady(self) -> bool:
        """Whether the head answered when last asked."""
        return self._missed == 0


def _probe(address: str, timeout: float) -> None:
    """Open a TCP connection: the quickest way to find that nothing is there."""
    if address == "auto":
        return
    url = urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = url.hostname, url.port
    except ValueError:
        host, port = None, None
    if not host or not port or url.scheme not in ("", "ray"):
        raise ClusterError(f"cluster address {address!r}: give local, auto, host:port, or ray://host:port")
    try:
        socket.create_connection((host, port), timeout=timeout).close()
    except OSError as error:
        raise ClusterAway(f"cluster {address}: nothing answers ({error.strerror or error})") from None


def _probe_in_subprocess(address: str, timeout: float) -> None:
    """Connect in a process that can be stopped: Ray tries for minutes where something else than Ray answers."""
    code = "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='ERROR')"
    try:
        result = subprocess.run(
            [sys.executable, "-c", code, address], capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        raise ClusterAway(f"cluster {address}: no Ray cluster answers there within {timeout:g} s") from None
    if "AuthenticationError" in result.stderr:
        raise ClusterError(
            f"cluster {address}: asks for a token; set RAY_AUTH_MODE=token in the environment, and give the token in "
            "RAY_AUTH_TOKEN or ~/.ray/auth_token"
        )
    if result.returncode:
        reason = last_line(result.stderr, "Ray gave no reason")
        raise ClusterError(f"cluster {address}: cannot be used: {reason}")


def _log_message(data: Mapping[str, Any], ignore_prefix: bool = True) -> None:
    """Log what Ray would print, in the place of ``ray._private.worker.print_to_stdstream``."""
    log("cluster_message", source=data.get("pid"), text=one_line(" ".join(data["lines"])))
