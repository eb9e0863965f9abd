"""Settings of a pool of workers, and of each worker in it. Imports neither ray nor torch."""

from __future__ import annotations

from dataclasses import dataclass

from workers.errors import ClusterError
from workers.messages import DEFAULT_BATCH_SIZE

LOCAL = "local"


@dataclass(frozen=True)
class ClusterSettings:
    """Settings of the cluster: where workers run and what each may use.

    ``address`` is ``"local"`` (a cluster of this machine alone, for this process), ``"auto"`` (a cluster that runs on
    this machine), a head node's ``host:port``, or ``ray://host:port``. ``workers=None`` takes as many as fit: one per
    GPU where there are GPUs, else one per core. ``gpus_per_worker=None`` takes one where there are GPUs, else none;
    several are of one node, and the model's layers are spread over them.
    ``memory_per_worker`` is in GiB, reserved in Ray's accounts. A worker uses as many threads as it has whole CPUs. A
    request is given up after ``max_attempts`` workers died or ran out of time over it.
    """

    address: str = LOCAL
    workers: int | None = None
    cpus_per_worker: float = 1.0
    gpus_per_worker: float | None = None
    memory_per_worker: float | None = None
    batch_size: int = DEFAULT_BATCH_SIZE
    max_attempts: int = 2
    connect_timeout_seconds: float = 30.0
    load_timeout_seconds: float = 900.0
    request_timeout_seconds: float = 3600.0

    def __post_init__(self) -> None:
        for name in ("workers", "batch_size", "max_attempts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ClusterError(f"cluster.{name} must be at least 1, not {value}")
        for name in ("connect_timeout_seconds", "load_timeout_seconds", "request_timeout_seconds"):
            if not getattr(self, name) > 0:
                raise ClusterError(f"cluster.{name} must be above 0, not {getattr(self, name)}")
        if not self.cpus_per_worker >= 0 or not (self.gpus_per_worker is None or self.gpus_per_worker >= 0):
            raise ClusterError("cluster.cpus_per_worker and cluster.gpus_per_worker must not be below 0")
        if (self.gpus_per_worker or 0) > 1 and self.gpus_per_worker != int(self.gpus_per_worker or 0):
            raise ClusterError(
                f"cluster.gpus_per_worker must be a part of one GPU or a whole number, not {self.gpus_per_worker:g}"
            )
        if self.memory_per_worker is not None and not self.memory_per_worker > 0:
            raise ClusterError(f"cluster.memory_per_worker must be above 0, not {self.memory_per_worker}")

    @property
    def threads(self) -> int:
        """Number of torch threads in each worker."""
        return max(1, int(self.cpus_per_worker))


@dataclass(frozen=True)
class WorkerSettings:
    """Settings of one worker: its number, threads, GPUs (part of one is one), batch size and memory of evaluations."""

    worker: int
    threads: int = 1
    gpus: int = 0
    batch_size: int = DEFAULT_BATCH_SIZE
    memory_bytes: int = 2 << 30
    """Kept between layer executions of an evaluation: prompts, masks, hidden states."""
