"""Force given tokens on generation: teacher forcing through ``generate``, which enters a model of any family."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList

from .ties import end_tokens

Read = Callable[[int, list[int], Tensor, Tensor], None]
"""Takes a step's number, the token of every row there, the model's float32 logits and what generation settings make
of them, ``[rows, vocabulary]`` each."""


def force(model: Any, inputs: Mapping[str, Any], tokens: Sequence[Sequence[int]], pad: int, read: Read) -> None:
    """Generate exactly each row's own ``tokens`` behind the prompts in ``inputs``, and let ``read`` see every step.

    Behind its last token a row goes on with the end token, which ``read`` is to leave out.
    """
    forcer = _Forcer(tokens, min(end_tokens(model), default=pad), read)
    # Some families (BLIP-2) leave generation to the language model inside them, which is then what is called.
    generating = [module for module in model.modules() if isinstance(module, GenerationMixin)]
    handles = [module.register_forward_hook(forcer.note) for module in generating]
    try:
        model.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            max_new_tokens=max(1, *map(len, tokens)),
            pad_token_id=pad,
            logits_processor=LogitsProcessorList([forcer]),
        )
    finally:
        for handle in handles:
            handle.remove()
    if forcer.steps < max(map(len, tokens)):
        raise RuntimeError("generation stopped before given tokens were read to their end; do its settings limit time?")


class _Forcer(LogitsProcessor):  # type: ignore[misc]  # transformers is not typed
    """Put each row's next token above all others."""

    def __init__(self, tokens: Sequence[Sequence[int]], end: int, read: Read) -> None:
        self._tokens, self._end, self._read = tokens, end, read
        self._logits: Tensor | None = None
        self.steps = 0

    def note(self, module: Any, args: Any, output: Any) -> None:
        """Forward hook: the logits of the next token, ``[rows, tokens, vocabulary]``."""
        if getattr(output, "logits", None) is not None:
            self._logits = output.logits[:, -1]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Show the step's logits, and replace ``scores`` ``[rows, vocabulary]``."""
        assert self._logits is not None
        step, self.steps = self.steps, self.steps + 1
        following = [own[step] if step < len(own) else self._end for own in self._tokens]
        self._read(step, following, self._logits.float(), scores)
        forced = torch.full_like(scores, -math.inf)
        forced[range(len(following)), following] = 0.0
        return forced
