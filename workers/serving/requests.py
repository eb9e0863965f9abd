"""Turn a task's samples into requests to an engine."""

from __future__ import annotations

import io
from typing import Any

from workers.engines.interface import ChatRequest
from workers.models.prompts import prompt_text
from workers.tasks import Sample, Task

LEAST_CONTEXT, LEAST_CACHE_BYTES = 2048, 2**28
"""Of a server: engines plan for larger images than a task may have."""


def chat_request(task: Task, sample: Sample, **options: Any) -> ChatRequest:
    """Ask a sample as the task does, its image as PNG. Raises ImageError where that cannot be opened."""
    picture = io.BytesIO()
    sample.image.open().save(picture, "PNG")
    return ChatRequest(prompt_text(task.spec, sample), (picture.getvalue(),), **options)


def context_of(config: Any, tokens: int) -> int:
    """Return how long the requests are that a server is started for: ``tokens`` and room, if the model allows it."""
    longest = int(config.get_text_config(decoder=True).max_position_embeddings)
    return min(longest, max(LEAST_CONTEXT, tokens))
