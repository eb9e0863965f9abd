"""Check whether this installation can run jobs: versions, devices, bundled files, cluster, database."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from packaging.requirements import Requirement

from optimizer.errors import explain
from workers.text import one_line

if TYPE_CHECKING:
    from workers.engines.interface import Engine

State = Literal["ok", "note", "problem"]
LEAST_FREE_BYTES = 2_000_000_000


@dataclass(frozen=True)
class Finding:
    """The result of one check; ``advice`` says what to do about a problem."""

    area: str
    state: State
    detail: str
    advice: str = ""


def examine(database_url: str, cluster_address: str) -> Iterator[Finding]:
    """Yield findings as they come, the quick ones first. Nothing is created and no local cluster is started."""
    yield from _versions()
    yield from _extras()
    yield _torchvision()
    yield from _devices()
    yield from _engines()
    yield from _bundled()
    yield _guarded("database", lambda: _database(database_url), "check the URL; skipplan db upgrade creates the tables")
    yield _guarded("cluster", lambda: _cluster(cluster_address), "check cluster.address and that the head node runs")
    yield _disk(Path.cwd())


def _guarded(area: str, look: Callable[[], Finding], advice: str) -> Finding:
    """Run one check; an error that a user can act on becomes a problem."""
    try:
        return look()
    except Exception as error:
        known = explain(error)
        detail = known[1] if known is not None else f"{type(error).__name__}: {one_line(error)}"
        return Finding(area, "problem", detail, advice)


def _requirements() -> Iterator[tuple[Requirement, str]]:
    """List the project's requirements, each with the extra it belongs to (``""`` for none)."""
    for line in metadata.requires("skipplan") or []:
        requirement = Requirement(line)
        extra = str(requirement.marker).split("==")[-1].strip(" \"'") if "extra" in str(requirement.marker) else ""
        yield requirement, extra


def _versions() -> Iterator[Finding]:
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.platform()}")
    yield Finding("skipplan", "ok", metadata.version("skipplan"))
    for requirement, extra in _requirements():
        if extra:
            continue
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Finding(requirement.name, "problem", "not installed", f"pip install '{requirement.name}'")
            continue
        fits = requirement.specifier.contains(found, prereleases=True)
        wanted = "" if fits else f", but {requirement.specifier} is needed"
        advice = "" if fits else f"pip install '{requirement.name}{requirement.specifier}'"
        yield Finding(requirement.name, "ok" if fits else "problem", f"{found}{wanted}", advice)


def _extras() -> Iterator[Finding]:
    """Check the optional dependencies, named by their use; their absence is no problem."""
    for module, extra, use in (
        ("psycopg", "postgres", "PostgreSQL databases"),
        ("datasets", "hub", "tasks from the Hugging Face hub"),
        ("pyarrow", "parquet", "tasks from Parquet files"),
        ("matplotlib", "figures", "pictures of reports (--format png)"),
    ):
        present = util.find_spec(module) is not None
        detail = f"{use}: {'there' if present else 'not there'}"
        advice = "" if present else f"pip install 'skipplan[{extra}]'"
        yield Finding(f"extra {extra}", "ok" if present else "note", detail, advice)


def _torchvision() -> Finding:
    from workers.models.without_torchvision import torchvision_problem

    problem = torchvision_problem()
    if not problem:
        return Finding("torchvision", "ok", f"{metadata.version('torchvision')}, used by processors")
    detail = f"{problem}; processors read images with Pillow"
    return Finding("torchvision", "note", detail, "a few families need it: install the build that fits torch's")


def _devices() -> Iterator[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("cpu", "ok", f"{cores} cores, torch on {torch.get_num_threads()} threads")
    yield _bfloat16()
    if not torch.cuda.is_available():
        yield Finding("gpu", "note", "none that torch can use; workers run on the CPU")
        return
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        yield Finding(f"gpu {number}", "ok", f"{about.name}, {about.total_memory / 1e9:.0f} GB")


def _bfloat16() -> Finding:
    import torch

    from workers.device.arithmetic import emulates

    if not emulates(torch.bfloat16, torch.device("cpu")):
        return Finding("cpu bfloat16", "ok", "multiplied by the CPU itself")
    return Finding("cpu bfloat16", "note", "emulated; model.dtype: auto computes in float32 instead, and much faster")


def _engines() -> Iterator[Finding]:
    """Name the engines that are here; their absence is no problem unless a variable names what is none."""
    from workers.engines.interface import ENGINES
    from workers.errors import EngineAbsent

    for name, engine in ENGINES.items():

        def look(engine: Engine = engine, name: str = name) -> Finding:
            try:
                found = engine.installed()
            except EngineAbsent as error:
                return Finding(f"engine {name}", "note", "not there", str(error))
            return Finding(f"engine {name}", "ok", f"{found.version}, {found.program}")

        yield _guarded(f"engine {name}", look, "see docs/how-to/serve.md")


def _bundled() -> Iterator[Finding]:
    from workers.messages import ModelSource
    from workers.models.checkpoint import (
        BUILT_MODELS,
        BUNDLED_MODELS,
        built_directory,
        bundled_models,
        check_checkpoint,
    )
    from workers.models.loading import load_config
    from workers.models.processors import load_processor
    from workers.tasks.spec import bundled_tasks, load_spec

    def model(name: str) -> Finding:
        check_checkpoint(BUNDLED_MODELS / name)
        source = ModelSource(name)
        load_processor(BUNDLED_MODELS / name, source, load_config(BUNDLED_MODELS / name, source))
        return Finding(f"model {name}", "ok", "bundled, its files are complete, its processor loads")

    def task(name: str) -> Finding:
        return Finding(f"task {name}", "ok", load_spec(name).description or "bundled")

    for name in bundled_models():
        yield _guarded(f"model {name}", lambda name=name: model(name), "install the project again")  # type: ignore[misc]
    for name, recipe in BUILT_MODELS.items():
        there = built_directory(name).is_dir()
        detail = f"built, at {built_directory(name)}" if there else "not built"
        yield Finding(
            f"model {name}", "ok" if there else "note", detail, "" if there else f"skipplan reference build {recipe}"
        )
    for name in bundled_tasks():
        yield _guarded(f"task {name}", lambda name=name: task(name), "install the project again")  # type: ignore[misc]


def _database(url: str) -> Finding:
    from sqlalchemy import make_url

    from storage.connection import hide_password, parse
    from storage.database import Database
    from storage.queue import jobs

    parsed = parse(url)
    file = parsed.database
    if make_url(url).get_backend_name() == "sqlite" and file and not Path(file).exists():
        return Finding("database", "note", f"{hide_password(parsed)} is not there yet; the first job creates it")
    with Database.open(url, create=False) as db:
        counted = {state: number for state, number in jobs.count(db).items() if number}
        states = ", ".join(f"{number} {state}" for state, number in counted.items()) or "no jobs yet"
        return Finding("database", "ok", f"{db.safe_url}: {states}")


def _cluster(address: str) -> Finding:
    if address == "local":
        return Finding("cluster", "ok", "local: each job starts a Ray instance of its own on this machine")
    import ray

    from workers.cluster.connection import connect, disconnect
    from workers.cluster.settings import ClusterSettings

    connect(ClusterSettings(address=address))
    try:
        there = ray.cluster_resources()
    finally:
        disconnect()
    return Finding("cluster", "ok", f"{address}: {there.get('CPU', 0):g} CPUs, {there.get('GPU', 0):g} GPUs")


def _disk(directory: Path) -> Finding:
    free = shutil.disk_usage(directory).free
    enough = free >= LEAST_FREE_BYTES
    return Finding(
        "disk",
        "ok" if enough else "note",
        f"{free / 1e9:.1f} GB free at {directory}",
        "" if enough else "exports and model downloads need room",
    )
