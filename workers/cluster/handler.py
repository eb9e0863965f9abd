"""Answer requests about one loaded model and one task, one after another."""

from __future__ import annotations

import os
import platform
import socket
from contextlib import nullcontext
from dataclasses import replace

import torch

from workers.cluster.settings import WorkerSettings
from workers.device import lock as device_lock
from workers.device.arithmetic import dtype_name, slow_arithmetic
from workers.errors import ModelError, TaskError
from workers.evaluation.dispatch import EvaluationDispatch
from workers.evaluation.passages import PassageEvaluator
from workers.evaluation.plain import DEFAULT_CACHE_BYTES, PlainEvaluator
from workers.evaluation.shown import show
from workers.evaluation.text_divergence import text_divergence
from workers.guard.fitter import fit_guards
from workers.latency.measure import compare_latency, profile_latency
from workers.latency.request import device_name
from workers.messages import (
    Alone,
    AnswerDense,
    CheckSpeculation,
    CompareEngineLatency,
    CompareLatency,
    CompareSpeculation,
    CompareText,
    EvaluateOtherTask,
    EvaluatePlans,
    FindEngine,
    FitCompensation,
    FitGuards,
    MeasureLinearRedundancy,
    MeasureRedundancy,
    ModelSource,
    ProfileLatency,
    Reply,
    Request,
    ShownSamples,
    ShowSamples,
    WorkerInfo,
)
from workers.models.checkpoint import find_checkpoint
from workers.models.loading import LoadedModel, choose_device, load_model
from workers.redundancy.measure import measure_redundancy
from workers.runtime.descriptor import UnsupportedFamilyError
from workers.runtime.families import describe
from workers.runtime.folding import folded_bytes
from workers.runtime.locate import locate
from workers.runtime.plan import LETTERS, SkipPlan
from workers.serving.latency import compare_engine_latency, find_engine
from workers.speculation.compare import check_speculation, compare_speculation
from workers.speculation.passes import verify_seconds
from workers.tasks import Task, TextTask
from workers.versions import installed_versions


class Handler:
    """Answer requests about one model and one task, which may be a joint one; packages of their own do the work."""

    def __init__(self, loaded: LoadedModel, task: Task, settings: WorkerSettings) -> None:
        self.loaded, self.task, self.settings = loaded, task, settings
        self.descriptor = describe(loaded.model)
        self._scored = max(1, len(task.parts)) + len(task.beside)
        self._cache_bytes = DEFAULT_CACHE_BYTES // self._scored
        self.evaluator = PlainEvaluator(loaded, task, batch_size=settings.batch_size, cache_bytes=self._cache_bytes)
        """Asks the whole task; of a joint one it scores nothing."""
        self._evaluations: dict[str, EvaluationDispatch] = {}
        """By name, what plans are scored on."""

    @classmethod
    def load(cls, source: ModelSource, task: Task, settings: WorkerSettings) -> Handler:
        """Set torch's threads and load the model, beside other workers that compute, but not while one times.

        Raises:
            ModelError: the model cannot be loaded, or the runtime cannot skip layers of such a model.
        """
        torch.set_num_threads(settings.threads)
        device = choose_device("cpu" if source.device == "auto" and not settings.gpus else source.device)
        gpus = max(1, settings.gpus)
        seen = range(min(gpus, torch.cuda.device_count()))
        devices = [torch.device(device, number) for number in seen] if device == "cuda" else [torch.device(device)]
        try:
            find_checkpoint(source)  # a download takes long, and no device
            with device_lock.computing(*devices):
                loaded = load_model(source, device=device, measuring=True, gpus=gpus)
            return cls(loaded, task, settings)
        except UnsupportedFamilyError as error:
            raise ModelError(f"model {source.path}: {error}") from None

    def with_task(self, task: Task) -> Handler:
        """Return a handler of the same model and another task; nothing computed for the old task is kept."""
        return Handler(self.loaded, task, self.settings)

    def evaluations(self, name: str) -> EvaluationDispatch:
        """Return what scores plans on a part of the task, or on what is beside it; the task itself for ``""``.

        All share one compensator, so that maps are fitted once, and the memory of the settings.

        Raises:
            TaskError: there is none of that name, or a joint task is to be scored as a whole.
        """
        part = self.task.part(name)
        if part.name not in self._evaluations:
            settings, compensator = self.settings, self.evaluator.compensator
            evaluator: PlainEvaluator | PassageEvaluator = self.evaluator
            if isinstance(part, TextTask):
                evaluator = PassageEvaluator(self.loaded, part, compensator, cache_bytes=self._cache_bytes)
            elif part is not self.task:
                evaluator = PlainEvaluator(
                    self.loaded,
                    part,
                    batch_size=settings.batch_size,
                    cache_bytes=self._cache_bytes,
                    compensator=compensator,
                )
            memory = settings.memory_bytes // self._scored
            self._evaluations[part.name] = EvaluationDispatch(evaluator, memory_bytes=memory)
        return self._evaluations[part.name]

    def _asking(self, name: str) -> PlainEvaluator:
        """Return the evaluator of a part of the task, or of a task beside it. Raises TaskError also for text."""
        plain = self.evaluations(name).plain
        if isinstance(plain, PassageEvaluator):
            raise TaskError(f"{name}: general text has no questions that could be asked")
        return plain

    @property
    def info(self) -> WorkerInfo:
        """Describe this worker and its model."""
        return WorkerInfo(
            worker=self.settings.worker,
            node=socket.gethostname(),
            device=device_name(*self.loaded.devices),
            device_id=f"{socket.gethostname()} {' '.join(map(device_lock.name, self.loaded.devices))}",
            threads=torch.get_num_threads(),
            model_family=self.descriptor.family,
            fingerprint=self.loaded.fingerprint,
            num_layers=self.descriptor.num_layers,
            allowed_actions=tuple(
                "".join(sorted((action.letter for action in allowed), key=LETTERS.index))
                for allowed in self.descriptor.allowed
            ),
            parameters=self.loaded.parameters,
            dtype=dtype_name(self.loaded.dtype),
            process=os.getpid(),
            versions={"python": platform.python_version(), **installed_versions()},
            hint=self._hint(),
            weight_bytes=sum(each.nbytes for each in self.loaded.model.parameters()),
            folded_bytes=folded_bytes(locate(self.loaded.model)),
        )

    def _hint(self) -> str:
        loaded, replaced = self.loaded, self.loaded.replaced_dtype
        hint = f"model.dtype: auto is float32 here: the device would emulate the checkpoint's {replaced}"
        hints = (hint if replaced else slow_arithmetic(loaded.dtype, loaded.device), loaded.not_shared)
        return "; ".join(filter(None, hints))

    def handle(self, request: Request) -> Reply:
        """Answer a request. What measures time takes the device for itself; everything else shares it.

        Fitting guards does both, one after the other.

        Raises:
            WorkersError: the request asks for something that is not there.
            PlanError: the model cannot take the plan.
        """
        with nullcontext() if isinstance(request, Alone) else device_lock.computing(*self.loaded.devices):
            return self._answer(request)

    def _answer(self, request: Request) -> Reply:
        loaded, task, compensator = self.loaded, self.task, self.evaluator.compensator
        match request:
            case EvaluatePlans():
                return self.evaluations(request.task).evaluate(request)
            case AnswerDense():
                return self._asking(request.task).answer_dense(request)
            case ShowSamples():
                asking = self._asking(request.task)
                samples = [asking.task.split(request.split)[index] for index in request.indices]
                return ShownSamples(show(asking, samples, pictures=request.pictures))
            case FitCompensation():
                return compensator.fit(request)
            case FitGuards():
                return fit_guards(loaded, task, request)
            case MeasureLinearRedundancy():
                return compensator.linear_redundancy(request)
            case MeasureRedundancy():
                return measure_redundancy(
                    loaded,
                    task,
                    request.kinds,
                    shard=request.shard,
                    shards=request.shards,
                    n_samples=request.n_samples,
                    batch_size=self.evaluator.batch_size,
                )
            case FindEngine():
                return find_engine(request.engine, loaded)
            case ProfileLatency():
                profile = profile_latency(
                    loaded, task, actions=request.actions, repeats=request.repeats, workload=request.workload
                )
                if request.verify:
                    profile = replace(profile, verify_seconds=verify_seconds(loaded, task, profile, request.repeats))
                return profile
        plan = SkipPlan.parse(request.plan)
        maps = compensator.maps(plan, request.compensation, request.artifact)
        match request:
            case EvaluateOtherTask():
                other = PlainEvaluator(loaded, request.task, batch_size=self.settings.batch_size)
                found = other.evaluate(plan, "held_out", request.n_samples, start=request.start, maps=maps)
                return replace(found, compensation=request.compensation)
            case CompareText():
                return text_divergence(loaded, plan, maps, request.text)
            case CompareLatency():
                return compare_latency(loaded, task, request, maps)
            case CompareSpeculation():
                return compare_speculation(self.evaluator, request, maps)
            case CheckSpeculation():
                return check_speculation(self.evaluator, request, maps)
            case CompareEngineLatency():
                return compare_engine_latency(loaded, task, request, maps)
