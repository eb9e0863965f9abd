"""Put samples through a model's processor without the model, to find those that a job could not ask."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from transformers import ProcessorMixin

from workers.errors import ImageError, TaskError
from workers.messages import ModelSource
from workers.tasks import Sample
from workers.tasks.spec import TaskSpec
from workers.text import describe_error

from .checkpoint import find_checkpoint
from .inputs import too_long
from .loading import load_config
from .multiple_choice import option_tokens
from .processors import load_processor
from .prompts import build_inputs, prompt_text, rendered, stray_token

Problem = tuple[str, str]
"""The field of the sample (``image``, ``question``, ``choices``; empty for the sample as a whole), and the reason."""


def find_problems(source: ModelSource, spec: TaskSpec, samples: Iterable[Sample]) -> Iterator[tuple[Sample, Problem]]:
    """Build every sample's inputs as a job does, and yield those for which that fails.

    Raises:
        ModelError: the processor cannot be loaded.
    """
    directory = find_checkpoint(source)
    config = load_config(directory, source)
    processor = load_processor(directory, source, config)
    for sample in samples:
        problem = _problem(processor, config, spec, sample)
        if problem:
            yield sample, problem


def _problem(processor: ProcessorMixin, config: Any, spec: TaskSpec, sample: Sample) -> Problem | None:
    if stray := stray_token(processor, sample):
        return stray
    try:
        inputs = build_inputs(processor, spec, [sample], [sample.image.open()])
        if spec.is_choice:
            option_tokens(processor, spec, sample)
        text = rendered(processor, spec, sample)
    except ImageError as error:
        return "image", str(error)
    except Exception as error:  # processors and chat templates of any family raise all kinds here
        return "", f"the model's processor refuses it: {describe_error(error, TaskError)}"
    if _packed(prompt_text(spec, sample)) not in _packed(text):
        return "", "the model's chat template leaves out the prompt's text"
    image_token = getattr(config, "image_token_id", None)
    if image_token is not None and not bool((inputs["input_ids"] == image_token).any()):
        return "", "the model's chat template leaves out the image"
    if reason := too_long(config, inputs["input_ids"].shape[1], spec.answer.max_new_tokens):
        return "", reason
    return None


def _packed(text: str) -> str:
    return "".join(text.split())
