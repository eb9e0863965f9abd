"""The model of lmms-eval that answers under a plan: ``--model skipplan --model_args plan=7,database=URL``.

Answers are those that skipplan's own evaluation scores: the same prompts through the model's processor and chat
template, greedy, and independent of what else is in the batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmms_eval.api.model import lmms
from transformers.utils import logging

from optimizer.errors import UsageFault
from optimizer.harness.subject import of_database, of_export
from workers.evaluation.plain import PlainEvaluator
from workers.tasks import Sample, Task, TaskSpec, parse_spec
from workers.tasks.harness.bridge import DEFAULT_NEW_TOKENS, cut, one_image, sampling, stops

if TYPE_CHECKING:
    from PIL.Image import Image

SHOWN_TOGETHER = 32
"""Requests between two steps of the progress bar."""


class SkipPlanModel(lmms):  # type: ignore[misc]
    """A model under a published plan. ``plan`` is its id in ``database``, or ``export`` the directory of an export.

    ``model_path`` says where the dense model is, if not where the plan's job found it.
    """

    is_simple = True

    def __init__(
        self,
        plan: int | None = None,
        database: str | None = None,
        export: str | None = None,
        model_path: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        if others:
            raise UsageFault(f"model_args: {next(iter(others))} is none of plan, database, export, model_path")
        if (plan is None) == (export is None):
            raise UsageFault("model_args: name a published plan (plan=7,database=URL) or an export (export=DIR)")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UsageFault("skipplan evaluates in one process; start lmms-eval without accelerate or torchrun")
        self._batch_size = int(batch_size)
        if export is not None:
            self._evaluated = of_export(Path(export), model_path, device)
        else:
            assert plan is not None
            self._evaluated = of_database(int(plan), database, model_path, device)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer requests greedily. Raises UsageFault for one that samples, or shows other than one image."""
        answers = []
        with logging.tqdm(total=len(requests), desc="skipplan") as progress:
            for most, chunk in _chunks(requests):
                answers += self._answers(chunk, most)
                progress.update(len(chunk))
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refuse tasks that score given continuations."""
        raise UsageFault("skipplan answers tasks of output_type generate_until; it gives no log-likelihoods")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refuse tasks of several rounds."""
        raise UsageFault("skipplan answers tasks of output_type generate_until, in one round")

    def _answers(self, requests: Sequence[Any], max_new_tokens: int) -> list[str]:
        evaluated = self._evaluated
        samples = [_sample(number, each, self.task_dict) for number, each in enumerate(requests)]
        task = Task(_spec(max_new_tokens), (), (), tuple(samples), "", "", "")
        evaluator = PlainEvaluator(evaluated.loaded, task, batch_size=self._batch_size, cache_bytes=0)
        found = evaluator.answer(evaluated.plan, samples, evaluated.maps)
        if found.failed:
            number, reason = next(iter(found.failed.items()))
            request = requests[int(number)].args
            raise UsageFault(f"task {request[4]}, document {request[3]}: {reason}")
        texts = []
        for sample, request in zip(samples, requests, strict=True):
            context, generation = request.args[0], request.args[1]
            texts.append(cut(found.texts[sample.id], stops(generation)))
            self.cache_hook.add_partial("generate_until", (context, generation), texts[-1])
        return texts


@dataclass(frozen=True)
class RequestImage:
    """The image of a request, which is opened when its batch is made."""

    doc_to_visual: Any
    documents: Any
    number: int

    def open(self) -> Image:
        """Return it in RGB. Raises the bridge's Refused for other than one."""
        found: Image = one_image(self.doc_to_visual(self.documents[self.number]), self.number)
        return found


def _sample(number: int, request: Any, documents: Mapping[str, Any]) -> Sample:
    context, generation, doc_to_visual, document, task, split = request.args
    if setting := sampling(generation):
        raise UsageFault(f"task {task}: its generation_kwargs have {setting}; skipplan decodes greedily")
    image: Any = RequestImage(doc_to_visual, documents[task][split], document)
    return Sample(str(number), image, str(number), context, ("-",))


def _chunks(requests: Sequence[Any]) -> Iterator[tuple[int, list[Any]]]:
    """Cut neighbours whose answers may be equally long into pieces."""
    for most, same in groupby(requests, key=lambda each: each.args[1].get("max_new_tokens") or DEFAULT_NEW_TOKENS):
        together = list(same)
        for start in range(0, len(together), SHOWN_TOGETHER):
            yield int(most), together[start : start + SHOWN_TOGETHER]


def _spec(max_new_tokens: int) -> TaskSpec:
    """Ask as every task of lmms-eval is asked: the request's text, and so many tokens."""
    content = {
        "name": "request",
        "source": {"kind": "scenes"},
        "prompt": "{question}",
        "answer": {"kind": "free", "max_new_tokens": max_new_tokens},
        "metric": "exact_match",
        "splits": {"calibration": 1, "search": 1, "held_out": 1},
    }
    return parse_spec(content)
