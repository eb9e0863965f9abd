"""``skipplan verify-export``: what was written, loaded in a fresh process, against the live model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimizer.exports import document, fresh_process, maps
from optimizer.exports.document import PlanDocument
from optimizer.exports.engine_verification import EngineVerification, Served, verify_in_engine
from optimizer.exports.interface import ExportFault, ExportFormat, Loadable
from optimizer.exports.target import checksum, inside, require_contained
from optimizer.exports.writing import UNLISTED, check_model, find_format
from storage.pareto import STANDALONE
from workers.engines.interface import ENGINES, Engine
from workers.errors import EngineAbsent, UnknownNameError
from workers.messages import ModelSource
from workers.runtime import SkipPlan
from workers.text import last_line

if TYPE_CHECKING:
    from torch import Tensor

    from workers.models.loading import LoadedModel
    from workers.runtime.folding import Maps
    from workers.tasks import Sample, Task

LOGIT_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3}
"""Largest allowed difference of logits as a share of the largest logit, by the arithmetic's dtype."""
TIMEOUT_SECONDS = 3600
FRESH_PROCESS_SAMPLES, ENGINE_SAMPLES = 8, 200
"""Held-out samples that are asked unless another number is given."""


@dataclass(frozen=True)
class Verification:
    """Outcome of a verification. ``answers`` pairs the live model's answer with the export's, by sample."""

    format: str
    plan: str
    files: int
    answers: dict[str, tuple[str, str]]
    largest_logit_difference: float
    """Over all steps and tokens, as a share of the largest logit."""
    tolerance: float
    model_class: str
    versions: dict[str, str]
    notes: tuple[str, ...]

    @property
    def differing(self) -> tuple[str, ...]:
        """Samples that were answered differently."""
        return tuple(sample for sample, (live, written) in self.answers.items() if live != written)

    @property
    def loaded(self) -> bool:
        """Whether there was a model to load."""
        return bool(self.answers)

    @property
    def passed(self) -> bool:
        """Equal answers, and logits within the tolerance."""
        return not self.differing and self.largest_logit_difference <= self.tolerance


def verify_export(
    directory: Path,
    source: ModelSource,
    *,
    task: str | Path | None = None,
    samples: int | None = None,
    python: str | None = None,
    engine: str | None = None,
    force_model: bool = False,
) -> Verification | EngineVerification:
    """Load what ``directory`` holds in a fresh process, or in an engine, and compare answers with the live model.

    ``task`` names the task whose held-out samples are asked (the plan's by default); ``python`` is the interpreter of
    the fresh process (this one by default). ``engine`` names an engine; by default the format's own where it is here.
    Formats without a model are checked for what they hold. Raises UsageFault when the export is damaged, or cannot be
    verified here, and as the engine does.
    """
    plan = document.read(directory)
    chosen = check_files(plan, directory)
    if python is not None and chosen.loadable is None and chosen.engine is not None:
        raise ExportFault(f"--python: format {chosen.name} is verified in its engine; leave the option out")
    drafts = plan.mode in chosen.drafts
    if engine is not None and drafts and STANDALONE not in chosen.drafts:
        raise ExportFault(
            f"--engine: a {chosen.name} export of a lossless plan drafts by its own speculate_from, in no engine; "
            "leave the option out, or export with --format drafter"
        )
    serving = find_engine(engine, chosen) if python is None or engine else None
    if serving is not None:
        check_model(plan, source, force_model=force_model)
        own_maps = maps.read(plan, maps.of_directory(plan, directory))
        questions = _load_task(plan, task), samples or ENGINE_SAMPLES
        subject = Served(directory.resolve(), plan, *verified_plan(plan, chosen, own_maps), drafts=drafts)
        return verify_in_engine(subject, serving, source, questions)
    samples = samples or FRESH_PROCESS_SAMPLES
    notes = tuple(chosen.check())
    if chosen.loadable is None:
        return Verification(chosen.name, plan.plan, _count(plan), {}, 0.0, 0.0, "", {}, notes)
    check_model(plan, source, force_model=force_model)
    with tempfile.TemporaryDirectory(prefix="skipplan-verify-") as name:
        scratch = Path(name)
        loadable = chosen.loadable(directory.resolve(), scratch, python or sys.executable)
        if drafts and loadable.loader == "transformers-remote-code":
            loadable = replace(loadable, loader="speculation")
        if drafts:  # passes of other widths round otherwise, which decides ties in lower precision
            source = replace(source, dtype="float32")
        asked = _Asked.of(plan, source, task, samples)
        own_maps = maps.read(plan, maps.of_directory(plan, directory))
        live_answers, live_logits = asked.ask_live(*verified_plan(plan, chosen, own_maps))
        result, logits = asked.ask_written(loadable, scratch)
    if drafts:
        notes += (f"the dense model passed {result['passes']} times for {result['tokens']} tokens",)
    largest = max(_difference(live, other) for live, other in zip(live_logits, logits, strict=True))
    pairs = zip(live_answers, result["answers"], strict=True)
    return Verification(
        format=chosen.name,
        plan=plan.plan,
        files=_count(plan),
        answers={sample.id: pair for sample, pair in zip(asked.samples, pairs, strict=True)},
        largest_logit_difference=largest,
        tolerance=LOGIT_TOLERANCE.get(asked.dtype, 1e-4),
        model_class=result["model_class"],
        versions=result["versions"],
        notes=notes,
    )


def verified_plan(plan: PlanDocument, chosen: ExportFormat, own_maps: Maps | None) -> tuple[SkipPlan, Maps | None]:
    """Return the plan and maps under which the live model answers as the export should: dense where it drafts."""
    if plan.mode in chosen.drafts:
        return SkipPlan.dense(len(plan.plan)), None
    return SkipPlan.parse(plan.plan), own_maps


def find_engine(name: str | None, chosen: ExportFormat) -> Engine | None:
    """Find the engine of this name, or that of the format where it is installed. Raises EngineError, ExportFault."""
    if name is None and chosen.engine is None:
        return None
    try:
        found = ENGINES[name or chosen.engine or ""]
    except UnknownNameError as error:
        raise ExportFault(f"--engine: {error}") from None
    try:
        found.installed()
    except EngineAbsent:
        if name is not None or chosen.loadable is None:
            raise
        return None  # which the format's check says
    return found


def _load_task(plan: PlanDocument, task: str | Path | None) -> Task:
    """Load the task whose samples are asked. Raises ExportFault saying how to name it."""
    from workers.errors import TaskError
    from workers.tasks.joint import load_tasks

    try:
        return load_tasks(task or plan.task.name)
    except TaskError as error:
        raise ExportFault(f"{error}; --task names the task file whose samples are asked") from None


def check_files(plan: PlanDocument, directory: Path) -> ExportFormat:
    """Return the export's format, if all its files are as they were written. Raises ExportFault naming the file."""
    if plan.export is None or not directory.is_dir():
        raise ExportFault(f"{directory} is a plan file, not the directory of an export")
    require_contained(directory)
    for name, expected in plan.export.files.items():
        file = inside(directory, name)
        if not file.is_file():
            raise ExportFault(f"{file} is missing: the export is damaged")
        if file.stat().st_size != expected.size or checksum(file) != expected.sha256:
            raise ExportFault(f"{file} is not as it was written: the export is damaged")
    present = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    for name in sorted(present - plan.export.files.keys() - UNLISTED):
        if name.endswith((".py", ".json", ".safetensors", ".sh")):
            raise ExportFault(f"{directory / name} was added after the export was written")
    return find_format(plan.export.format)


def _count(plan: PlanDocument) -> int:
    return len(plan.export.files) if plan.export else 0


def _difference(live: Tensor, written: Tensor) -> float:
    """Largest difference of two ``[steps, vocabulary]`` logits over the steps both made, as a share of the largest."""
    steps = min(len(live), len(written))
    scale = max(1e-6, live[:steps].abs().max().item())
    return float((live[:steps] - written[:steps]).abs().max().item() / scale)


@dataclass(frozen=True)
class _Asked:
    """The questions, and the live model to compare with."""

    loaded: LoadedModel
    checkpoint: Path
    """The live model's directory."""
    task: Task
    samples: Sequence[Sample]
    dtype: str

    @classmethod
    def of(cls, plan: PlanDocument, source: ModelSource, task: str | Path | None, samples: int) -> _Asked:
        from workers.models.checkpoint import find_checkpoint
        from workers.models.loading import load_model

        loaded_task = _load_task(plan, task)
        loaded = load_model(source, device="cpu")
        dtype = str(loaded.model.dtype).removeprefix("torch.")
        return cls(loaded, find_checkpoint(source), loaded_task, loaded_task.held_out[:samples], dtype)

    def ask_live(self, plan: SkipPlan, own_maps: Maps | None) -> tuple[list[str], list[Tensor]]:
        """Answers and logits of the live model under the plan and its maps, one sample at a time."""
        from workers.models.prompts import build_inputs
        from workers.runtime import apply

        answers, logits = [], []
        with apply(self.loaded.model, plan, own_maps):
            for sample in self.samples:
                inputs = build_inputs(self.loaded.processor, self.task.spec, [sample], [sample.image.open()])
                answer, _, steps = fresh_process.generate_with_logits(
                    self.loaded.model, self.loaded.processor, inputs, self.task.spec.answer.max_new_tokens
                )
                answers.append(answer)
                logits.append(steps)
        return answers, logits

    def ask_written(self, loadable: Loadable, scratch: Path) -> tuple[dict[str, Any], list[Tensor]]:
        """Answers and logits of the export in a fresh process. Raises ExportFault when it cannot be loaded."""
        from safetensors.torch import load_file

        request = scratch / "request.json"
        request.write_text(json.dumps(self._request(loadable, scratch)), encoding="utf-8")
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(scratch / "modules")}
        try:
            done = subprocess.run(
                [loadable.python, "-I", fresh_process.__file__, str(request)],
                cwd=scratch,
                env=environment,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=TIMEOUT_SECONDS,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ExportFault(f"the export cannot be loaded by {loadable.python}: {error}") from None
        if done.returncode:
            reason = last_line(done.stderr, "no message")
            raise ExportFault(f"the export does not load in a fresh process: {reason}")
        logits = load_file(scratch / "logits.safetensors")
        result = json.loads((scratch / "result.json").read_text(encoding="utf-8"))
        return result, [logits[str(number)] for number in range(len(self.samples))]

    def _request(self, loadable: Loadable, scratch: Path) -> dict[str, Any]:
        import torch

        from workers.models import without_torchvision
        from workers.models.prompts import has_chat_template, prompt_text, template_settings

        chat = has_chat_template(self.loaded.processor)
        token = getattr(self.loaded.processor, "image_token", None) or "<image>"
        questions = []
        for number, sample in enumerate(self.samples):
            image = scratch / f"{number}.png"
            sample.image.open().save(image)
            text = prompt_text(self.task.spec, sample)
            if not chat:
                text = self.task.spec.plain_prompt.format(image=token, prompt=text)
            questions.append({"image": str(image), "text": text})
        drafts = loadable.loader in ("drafter", "speculation")
        return {
            "directory": str(self.checkpoint if drafts else loadable.directory),
            "drafter": str(loadable.directory) if drafts else None,
            "processors": without_torchvision.__file__,
            "loader": loadable.loader,
            "dtype": self.dtype,
            "chat": chat,
            "template": template_settings(self.loaded.processor),
            "questions": questions,
            "max_new_tokens": self.task.spec.answer.max_new_tokens,
            "threads": torch.get_num_threads(),
        }
