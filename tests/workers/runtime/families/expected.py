"""The references' answers, computed once per session: many tests ask for the same plan and prompt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from .catalogue import SUPPRESSED, by_name, model_of
from .references import reference_logits
from .tiny import Family, Prompt


@cache
def _logits(family_name: str, plan: str, prompt: Prompt, answer: tuple[int, ...]) -> Tensor:
    return reference_logits(model_of(family_name, "eager"), by_name(family_name), plan, prompt, answer)


def expected_logits(family: Family, plan: str, prompt: Prompt, answer: Sequence[int] = ()) -> Tensor:
    """Logits [tokens, vocabulary] of the prompt followed by the answer; a copy that may be changed."""
    return _logits(family.name, plan, prompt, tuple(answer)).clone()


def expected_next(family: Family, plan: str, prompt: Prompt, answer: Sequence[int]) -> Tensor:
    """Logits [vocabulary] of the next token, with the ids that generation suppresses ruled out."""
    last = expected_logits(family, plan, prompt, answer)[-1]
    last[list(SUPPRESSED)] = -torch.inf
    return last


def expected_generation(family: Family, plan: str, prompt: Prompt, length: int) -> tuple[list[int], Tensor]:
    """Greedy answer, the whole sequence run again for every token, and its logits [length, vocabulary]."""
    answer: list[int] = []
    logits: list[Tensor] = []
    for _ in range(length):
        logits.append(expected_logits(family, plan, prompt, answer)[-1])
        answer.append(int(expected_next(family, plan, prompt, answer).argmax()))
    return answer, torch.stack(logits)
