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


_found: dict[tuple[str, str, Prompt], list[int]] = {}


def expected_generation(
    family: Family, plan: str, prompt: Prompt, length: int, guess: Sequence[int] = ()
) -> tuple[list[int], Tensor]:
    """Greedy answer, uncached, and its logits [length, vocabulary].

    Without a guess the whole sequence is run again for every token. Positions see none after them, so that a run with
    the guessed tokens gives all steps up to the first one that is not the reference's own. What was found before is a
    guess as well.
    """
    guess = guess or _found.get((family.name, plan, prompt), ())
    answer: list[int] = []
    logits: list[Tensor] = []
    while len(answer) < length:
        guessed = list(guess[len(answer) : length - 1])
        steps = expected_logits(family, plan, prompt, [*answer, *guessed])[-len(guessed) - 1 :]
        for step, token in zip(steps, [*guessed, None], strict=True):
            logits.append(step)
            answer.append(_next(step))
            if answer[-1] != token:
                break
    _found[family.name, plan, prompt] = answer
    return answer, torch.stack(logits)


def _next(step: Tensor) -> int:
    allowed = step.clone()
    allowed[list(SUPPRESSED)] = -torch.inf
    return int(allowed.argmax())
