"""Put the dense model's answers behind the prompts of a batch, so that a replay reads harm at every token of them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import BatchFeature

from workers.models.fed_answers import append_answers, generate_fed_answers
from workers.models.inputs import PreparedBatch
from workers.models.loading import LoadedModel
from workers.tasks import Task

from .batches import Batch, token_groups
from .replay import NotANumberError, prefill

MOST_TOKENS = 32
"""Tokens of an answer that count at most; what goes wrong later in long answers has begun before."""

LARGEST_CHANGE = {torch.float32: 1e-3, torch.float16: 5e-3}
LARGEST_CHANGE_OTHERWISE = 0.03
"""By how much, relative to the largest logit, an answer may move what is read before it: rounding, and no more.
Otherwise is bfloat16, alone or beside quantised weights."""


def with_answers(loaded: LoadedModel, task: Task, batch: Batch, vision_token_ids: tuple[int, ...]) -> Batch:
    """Return the batch with the dense model's answers behind its prompts, each up to its first vision token.

    Raises NoPromptsReturnedError for families whose answers cannot be had, NotANumberError when logits hold NaN.
    """
    prompts = PreparedBatch(batch.samples, BatchFeature(batch.inputs), {})
    answers, failed = generate_fed_answers(loaded, prompts, min(MOST_TOKENS, task.spec.answer.max_new_tokens))
    if failed:
        raise NotANumberError(tuple(failed))
    answers = [before_vision(answer, vision_token_ids) for answer in answers]
    width = max(map(len, answers))
    if not width:
        return batch
    filler = next(int(answer[0]) for answer in answers if len(answer))  # any token of text: it is masked
    inputs = dict(append_answers(prompts.inputs, answers, filler))
    return replace(batch, inputs=inputs, groups=token_groups(inputs, vision_token_ids, width), answer_tokens=width)


def before_vision(answer: Tensor, vision_token_ids: tuple[int, ...]) -> Tensor:
    """Return an answer's tokens before its first vision token: fed back, that one would ask for an image."""
    vision = torch.isin(answer, torch.tensor(vision_token_ids, dtype=answer.dtype)).nonzero()
    return answer[: int(vision[0])] if len(vision) else answer


def answers_change_prompts(loaded: LoadedModel, prompts: Batch, answered: Batch) -> bool:
    """Whether answers change what is read at the prompts' last token: some families let prompts see what follows."""
    alone = prefill(loaded, prompts)[:, 0]
    followed = prefill(loaded, answered)[:, 0]
    largest = LARGEST_CHANGE.get(loaded.model.dtype, LARGEST_CHANGE_OTHERWISE) * alone.abs().max()
    return bool((alone - followed).abs().max() > largest)
