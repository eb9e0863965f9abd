"""Which model a worker loads, and what it says once it is ready."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class ModelSource:
    """Name a model and how it is loaded.

    ``path`` is a directory, the name of a bundled reference model, or a hub id. ``device`` is ``"auto"`` (a GPU if
    the worker holds one, else the CPU), ``"cpu"`` or ``"cuda"``. ``dtype`` is a torch dtype name or ``"auto"`` (the
    checkpoint's own; workers take float32 where their device would emulate that). ``allow_pickle`` names pickled weight
    files that may be read where there are no safetensors.
    """

    path: str
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    attention: str = "sdpa"
    trust_remote_code: bool = False
    allow_pickle: tuple[str, ...] = ()


@dataclass(frozen=True)
class WorkerInfo:
    """Describe a worker that is ready, and the model it holds."""

    worker: int
    node: str
    device: str
    threads: int
    model_family: str
    fingerprint: str
    num_layers: int
    allowed_actions: tuple[str, ...]
    """Per layer the letters of the actions it may take, for example ``"RS"``."""
    parameters: int
    dtype: str
    process: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    hint: str = ""
    """One-line performance hint; empty if there is none."""
    weight_bytes: int = 0
    folded_bytes: tuple[int, ...] = ()
    """Per layer, the bytes of the projections that a map is folded into; 0 where none can be."""
    device_id: str = ""
    """The same for workers that share a device: the node, and its GPU or its processor."""
